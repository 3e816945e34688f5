"""SigLIP over video. These files travel with saved models."""
