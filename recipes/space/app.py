"""Serves the page. The Hub sets address and port."""

from pathlib import Path

from neuroflow_hf.app.page import serve

serve(model=Path(__file__).resolve().with_name("model"))
