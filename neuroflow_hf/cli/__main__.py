"""`python -m neuroflow_hf.cli`, as `accelerate launch -m` and `torchrun -m` need it."""

from .main import app

if __name__ == "__main__":
    app()
