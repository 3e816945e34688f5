"""Fills the command line's page from the commands themselves when the site is built."""

import re

import typer

from neuroflow_hf.cli.main import app


def options_of(command) -> str:
    """A command's arguments and options as a table in Markdown."""
    rows = ["| option | meaning | default |", "|---|---|---|"]
    for parameter in command.params:
        if parameter.name == "help" or getattr(parameter, "hidden", False):
            continue
        is_option = parameter.param_type_name == "option"
        names = parameter.opts + parameter.secondary_opts if is_option else [parameter.name]
        default = getattr(parameter, "show_default", "")
        default = default if isinstance(default, str) else parameter.default
        if default is None or default is False or callable(default):
            default = ""
        elif default is True:
            default = parameter.opts[0]
        cells = [" ".join(f"`{name}`" for name in names), getattr(parameter, "help", None) or "", f"{default}"]
        rows.append(f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows)


def on_page_markdown(markdown: str, page, **kwargs) -> str:
    """Replace the marker on the command line's page."""
    if page.file.src_uri != "reference/cli.md":
        return markdown
    parts = [
        f"## neuroflow {name}\n\n{command.help}\n\n{options_of(command)}"
        for name, command in typer.main.get_command(app).commands.items()
    ]
    return markdown.replace("<!-- commands -->", "\n\n".join(parts))


def on_page_content(html: str, page, **kwargs) -> str:
    """Render the marks of transformers' docstrings: [`Name`] and (`type`, *optional*)."""

    def types(match: re.Match) -> str:
        return re.sub(r"`([^`]*)`", r"<code>\1</code>", match[1]).replace("*optional*", "optional")

    html = re.sub(r"\[(<code>[^<]*</code>)\]", r"\1", html)
    return re.sub(r"<code>(`[^<]*)</code>", types, html)
