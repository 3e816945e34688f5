"""A page in the browser: a video with its overlay, search in embedded videos, dense and bypassed text side by side."""

try:
    import gradio  # noqa: F401
except ImportError as error:
    raise ImportError('The page needs the extra `app`: pip install "neuroflow-hf[app]".') from error
