"""Command line from one flat frozen dataclass: flags, presets, did-you-mean errors."""

import argparse
import dataclasses
import difflib
import json
import pathlib
import sys
import typing


class UserError(Exception):
    """A user's mistake: printed as one line on stderr, exit status 2."""


def script_name():
    return pathlib.Path(sys.argv[0]).name



def opt(default, help, choices=None, positional=False, free=False):
    """A Config field with help text.  positional: takes the words after the command.

    free: may change when a run continues (out, device, wandb and json always may).
    """
    meta = dict(help=help, choices=choices, positional=positional, free=free)
    return dataclasses.field(default=default, metadata=meta)


def parse(Config, presets, commands, argv=None):
    """(command, cfg): defaults, then the preset, then the flags.  Raises UserError on anything unknown.

    presets: name -> dict(set={field: value}, paper="table 8, column L/2", expect={"fid": 1.54}).
    The first command is the default.  A field `config` names a JSON file of flags, between preset and flags.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    fields = {f.name: f for f in dataclasses.fields(Config)}
    command = argv.pop(0) if argv and not argv[0].startswith("-") else commands[0]
    if command not in commands:
        raise UserError(unknown("command", command, commands))
    parser = _parser(Config, presets, commands)
    space, rest = parser.parse_known_args(argv)
    flags = vars(space)
    words = [word for word in rest if not word.startswith("-")]
    strange = [word for word in rest if word.startswith("-")]
    if strange:
        name = strange[0].split("=")[0]
        raise UserError(unknown("flag", name, ["--" + n.replace("_", "-") for n in fields]))
    for f in fields.values():
        if f.metadata.get("positional") and words:
            flags[f.name], words = tuple(words), []
    if words:
        raise UserError(f"unexpected word '{words[0]}' after '{command}'")
    if flags.get("config"):
        flags = {**from_file(flags["config"], Config), **flags}
    preset = flags.get("preset", fields["preset"].default)
    if preset and preset not in presets:
        raise UserError(unknown("preset", preset, presets))
    values = dict(presets[preset]["set"]) if preset else {}
    for name in values:
        if name not in fields:
            raise KeyError(f"preset {preset} sets {name}, which Config does not have")
    values.update(flags)
    if not values.get("out"):
        values["out"] = str(pathlib.Path("runs", script_name().removesuffix(".py"), preset or "default"))
    return command, Config(**values)


def from_file(path, Config):
    """{field: value} of a JSON object of flags, or of the config.json of a run, whose words it leaves out."""
    try:
        data = json.loads(pathlib.Path(path).read_text())
    except ValueError as error:
        raise UserError(f"--config {path}: not JSON ({error})") from None
    data = data.get("config", data) if isinstance(data, dict) else data
    if not isinstance(data, dict):
        raise UserError(f"--config {path}: expected a JSON object of flags")
    fields, hints, values = {f.name: f for f in dataclasses.fields(Config)}, typing.get_type_hints(Config), {}
    for name, value in data.items():
        if name not in fields:
            raise UserError(unknown(f"name in {path}", name, fields))
        hint, choices = hints[name], fields[name].metadata.get("choices")
        args = typing.get_args(hint)
        kinds = [typing.get_origin(a) or a for a in (args if type(None) in args else (hint,))]
        value = tuple(value) if tuple in kinds and isinstance(value, list) else value
        value = float(value) if float in kinds and type(value) is int else value
        if type(value) not in kinds:
            wanted = " or ".join(k.__name__ for k in kinds)
            raise UserError(f"--config {path}: {name} takes {wanted}, not {json.dumps(value)}")
        if choices and value not in choices:
            raise UserError(unknown(f"{name} in {path}", value, choices))
        if name != "config" and not fields[name].metadata.get("positional"):
            values[name] = value
    return values


def _parser(Config, presets, commands):
    doc = sys.modules[Config.__module__].__doc__ or ""
    rows = "\n".join(f"  {name:<20} {p.get('paper', '-')}"
                     + "".join(f", {k} {v}" for k, v in p.get("expect", {}).items())
                     for name, p in presets.items())
    parser = _Parser(prog=script_name(), description=doc, allow_abbrev=False,
                     argument_default=argparse.SUPPRESS,
                     usage=f"{script_name()} [{'|'.join(commands)}] [--preset NAME] [--flag VALUE ...]",
                     epilog=f"commands: {', '.join(commands)} (default {commands[0]})\n\n"
                            f"presets (paper row, paper value):\n{rows}",
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = typing.get_type_hints(Config)
    for f in dataclasses.fields(Config):
        meta, flag = f.metadata, "--" + f.name.replace("_", "-")
        if meta.get("positional"):
            continue
        text = (meta.get("help", "") + f" [{f.default}]").replace("%", "%%")
        if hints[f.name] is bool:
            parser.add_argument(flag, dest=f.name, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(flag, dest=f.name, help=text, metavar=f.name.upper(),
                                type=_reader(flag, hints[f.name], f.default, meta.get("choices")))
    return parser


def _reader(flag, hint, default, choices):
    """The function that turns one flag's text into its value, or raises UserError with a way out."""
    optional = type(None) in typing.get_args(hint)
    kind = next((a for a in typing.get_args(hint) if a is not type(None)), hint) if optional else hint

    def read(text):
        try:
            if optional and text.lower() == "none":
                return None
            if kind is tuple or typing.get_origin(kind) is tuple:
                item = type(default[0]) if default else float
                return tuple(item(part) for part in text.split(",") if part)
            value = int(float(text)) if kind is int and "e" in text.lower() else kind(text)
        except ValueError:
            raise UserError(f"{flag} takes {getattr(kind, '__name__', kind)}, not '{text}'") from None
        if choices and value not in choices:
            raise UserError(unknown(flag, value, choices))
        return value
    return read


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def unknown(what, got, known):
    """One line: unknown preset 'x'; did you mean 'y'?  (or the list, when nothing is near)"""
    known = [str(k) for k in known]
    near = difflib.get_close_matches(str(got), known, 1)
    hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
    return f"unknown {what} '{got}'; {hint}"
