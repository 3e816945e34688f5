"""JSON, TOML and CSV, written out of what packages say: pure functions from content to texts."""

import csv
import email
import io
import json
import re
from collections.abc import Iterator

BROWSERS = ("chrome", "firefox", "safari")
ENTRIES = 24  # definitions in one text
DEFINITION = re.compile(r"^ {4}(n|v|adj|adv) (?:1: )?(.*)")
SENSE = re.compile(r"^ {4} +(\d+): (.*)")
PARTS = {"n": "noun", "v": "verb", "adj": "adjective", "adv": "adverb"}


def compat_texts(compat: dict) -> Iterator[tuple[str, str]]:
    """
    From the data of `@mdn/browser-compat-data`, for every interface, property or element, a place and indented JSON:
    each of its features with its status and the version of some browsers.
    """
    groups = {"api": compat["api"], "css/properties": compat["css"]["properties"]}
    groups |= {
        "html/elements": compat["html"]["elements"],
        "javascript/builtins": compat["javascript"]["builtins"],
        "http/headers": compat["http"]["headers"],
        "webextensions/api": compat["webextensions"]["api"],
    }
    for group, features in groups.items():
        for name in sorted(features):
            content = pruned(features[name])
            if content:
                yield f"{group}/{name}", json.dumps({name: content}, indent=2, ensure_ascii=True)


def pruned(feature: dict) -> dict:
    """A feature without notes and less known browsers; its own features inside."""
    said = feature.get("__compat", {})
    found = {}
    if said:
        versions = {}
        for browser in BROWSERS:
            support = said.get("support", {}).get(browser)
            newest = support[0] if isinstance(support, list) else support
            if newest is not None:
                versions[browser] = newest.get("version_added")
        found = {"support": versions, "status": said.get("status", {})}
        if "mdn_url" in said:
            found = {"url": said["mdn_url"].split("/docs/", 1)[-1], **found}
    inside = {name: pruned(value) for name, value in feature.items() if name != "__compat"}
    return found | {name: value for name, value in inside.items() if value}


def metadata_texts(metadata: str) -> Iterator[tuple[str, str]]:
    """A wheel's METADATA as the `[project]` table of a `pyproject.toml`, and as JSON."""
    said = email.message_from_string(metadata)
    project = {
        "name": said["Name"],
        "version": said["Version"],
        "description": (said["Summary"] or "").strip(),
        "requires-python": said["Requires-Python"] or ">=3.10",
        "keywords": re.split(r"[,\s]+", said["Keywords"]) if said["Keywords"] else [],
        "classifiers": said.get_all("Classifier", []),
        "dependencies": [item for item in said.get_all("Requires-Dist", []) if "extra" not in item],
    }
    extras: dict[str, list[str]] = {name: [] for name in said.get_all("Provides-Extra", [])}
    for item in said.get_all("Requires-Dist", []):
        name = re.search(r"extra\s*==\s*['\"]([^'\"]+)", item)
        if name and name[1] in extras:
            extras[name[1]].append(item.split(";")[0].strip())
    urls = dict(url.split(", ", 1) for url in said.get_all("Project-URL", []) if ", " in url)
    tables = {"project": project, "project.optional-dependencies": extras, "project.urls": urls}
    yield "pyproject.toml", toml_tables(tables)
    yield "json", json.dumps({**project, "optional-dependencies": extras, "urls": urls}, indent=2)


def toml_tables(tables: dict[str, dict]) -> str:
    """TOML of tables with strings and lists of strings, empty ones left out; lists one item a line."""
    parts = []
    for name, table in tables.items():
        lines = [f"[{name}]"]
        for key, value in table.items():
            bare = key if re.fullmatch(r"[\w-]+", key, re.ASCII) else json.dumps(key)
            if isinstance(value, str):
                lines.append(f"{bare} = {json.dumps(value)}")
            elif value:
                lines += [f"{bare} = [", *(f"    {json.dumps(item)}," for item in value), "]"]
        if len(lines) > 1:
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def definition_texts(entries: str) -> Iterator[tuple[str, str]]:
    """
    Tables of words out of WordNet as dictd has it, in turn as JSON, CSV and TOML. Synonyms share their definition
    there: each definition comes once, with the first word that has it, so that no two texts say the same.
    """
    rows, seen = [], set()
    for word, part, definition in definitions(entries):
        if definition not in seen and word.isascii() and definition.isascii():
            seen.add(definition)
            rows.append({"word": word, "part": part, "definition": definition})
    # every fourth table is enough
    for first in range(0, len(rows) - ENTRIES + 1, 4 * ENTRIES):
        table = rows[first : first + ENTRIES]
        form = ("json", "csv", "toml")[first // (4 * ENTRIES) % 3]
        yield f"{table[0]['word']}.{form}", written(table, form)


def definitions(entries: str) -> Iterator[tuple[str, str, str]]:
    """Word, part of speech and definition, without examples and cross references."""
    word, part, lines = "", "", []

    def finished() -> Iterator[tuple[str, str, str]]:
        text = re.sub(r"\s+", " ", " ".join(lines)).split("[")[0].split('; "')[0].strip(" ;")
        if word and part and text and "{" not in text:
            yield word, part, text

    for line in entries.split("\n"):
        begins, senses = DEFINITION.match(line), SENSE.match(line)
        if not line.startswith(" ") or begins or senses:
            yield from finished()
            lines = []
        if not line.startswith(" "):
            word, part = line.strip(), ""
        elif begins:
            part, lines = PARTS[begins[1]], [begins[2]]
        elif senses:
            lines = [senses[2]]
        elif lines:
            lines.append(line)
    yield from finished()


def written(table: list[dict[str, str]], form: str) -> str:
    """A table as `json` (a list of objects), `csv` (with a head) or `toml` (an array of tables)."""
    if form == "json":
        return json.dumps(table, indent=2)
    if form == "csv":
        file = io.StringIO()
        rows = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        rows.writeheader()
        rows.writerows(table)
        return file.getvalue()
    return "\n\n".join("\n".join(["[[entry]]", *(f"{k} = {json.dumps(v)}" for k, v in row.items())]) for row in table)
