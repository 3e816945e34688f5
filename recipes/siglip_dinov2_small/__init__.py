"""DINOv2-small from a wheel, in SigLIP's architecture."""
