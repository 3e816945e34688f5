"""The embedded SigLIP: data, captions, training."""
