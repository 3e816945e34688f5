"""The command line: one module for each command."""

try:
    import rich  # noqa: F401
    import typer  # noqa: F401
except ImportError as error:
    raise ImportError('The command line needs the extra `cli`: pip install "neuroflow-hf[cli]".') from error
