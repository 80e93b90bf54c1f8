"""Grammar rules of one call in each model's format, used by `grammar`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fd_dsa.chat import tool_formats as marks
from fd_dsa.chat.arguments import Argument, ArgumentList, argument_lists
from fd_dsa.chat.enforced import constraints
from fd_dsa.chat.glm_tools import GlmTools
from fd_dsa.chat.json_document import json_document, key_regex, plain_target
from fd_dsa.chat.lark import Lark
from fd_dsa.chat.schema import KINDS, SchemaError, ToolSchema
from fd_dsa.chat.value_text import BoundedNumberError, ValueTexts

# DSML puts this between the name and the value of an argument
_STRING = '" string="{}">'
_TEXT = frozenset({"string"})
# argument names that the parsers of the formats can read
_DSML_NAME = re.compile(r'[^"<>\n]{1,128}')
_GLM_NAME = re.compile(r"[^<>\s](?:[^<>\n]{0,62}[^<>\s])?")
# names that the schema leaves open are short
_SHORT_NAME = ".{1,40}"
# a value with markup would be ambiguous
_DSML_MARKS = (f"<{marks.DSML}", f"</{marks.DSML}")
_GLM_MARKS = GlmTools.markers


class CallWriter:
    """Writes the rules of one tool's calls.

    Args:
        name: name of the tool in calls.
        schema: JSON schema of its arguments.
    """

    def __init__(self, lark: Lark, name: str, schema: ToolSchema) -> None:
        self._lark = lark
        self._name = name
        self._schema = schema
        self._texts = ValueTexts(schema, lark)
        self._documents: dict[tuple[Any, ...], str] = {}
        # arguments that are numbers with bounds in at least one alternative
        self._bounded: set[str | None] = set()
        # True if arguments of any name have the same schema
        self._is_uniform = False

    def v31_call(self) -> str:
        """Return the rule of a DeepSeek-V3.1 call. Its arguments are always a JSON object."""
        head = self._lark.literal(marks.V31_CALL + self._name + marks.V31_SEPARATOR)
        root = True if self._schema.root is None else self._schema.root
        if "object" not in self._schema.kinds([root]):
            raise SchemaError("got a schema that no arguments satisfy")
        arguments = self._json([root], frozenset({"object"}))
        return f"{head} {arguments} {self._lark.literal(marks.V31_CALL_END)}"

    def dsml_call(self) -> str:
        """Return the rule of a DeepSeek-V3.2 or V4 call."""
        literal = self._lark.literal
        head = literal(f'{marks.V32_CALL} name="{self._name}">\n')
        lists = argument_lists(self._schema)
        bodies = self._bodies(lists, _DSML_NAME, self._dsml_argument)
        if any(not each.min_count and _is_optional(each) for each in lists):
            bodies.append(literal("\n"))
        end = literal(f"{marks.V32_CALL_END}\n")
        return f"{head} {self._lark.one_of(bodies)} {end}"

    def _dsml_argument(self, key: str, argument: Argument) -> str | None:
        """Return the rule of a DSML argument, whose value is plain text or JSON."""
        head = self._lark.literal(f'{marks.V32_ARGUMENT} name="')
        end = f"{marks.V32_ARGUMENT_END}\n"
        kinds = self._schema.kinds(argument.parts)
        forms = []
        if "string" in kinds:
            text = self._texts.text(argument.parts, _DSML_MARKS, frozenset())
            if text is not None:
                text = self._lark.text_until(end, text)
                forms.append(f"{self._lark.literal(_STRING.format('true'))} {text}")
        if kinds - _TEXT:
            value = self._json(argument.parts, kinds - _TEXT)
            form = self._lark.literal(_STRING.format("false"))
            forms.append(f"{form} {value} {self._lark.literal(end)}")
        return f"{head} {key} {self._lark.one_of(forms)}" if forms else None

    def glm_call(self) -> str:
        """Return the rule of a GLM call."""
        head = self._lark.literal(marks.GLM_CALL + self._name)
        lists = argument_lists(self._schema)
        arguments = [argument for each in lists for argument in each.arguments]
        is_one = len(lists) == 1 and len(arguments) == 1 and arguments[0].pattern is None
        self._is_uniform = is_one and not self._schema.argument_names()
        self._bounded = {argument.name for argument in arguments if self._has_bounds(argument)}
        bodies = self._bodies(lists, _GLM_NAME, self._glm_argument)
        return f"{head} {self._lark.one_of(bodies)} {self._lark.literal(marks.GLM_CALL_END)}"

    def _glm_argument(self, key: str, argument: Argument) -> str | None:
        """Return the rule of a GLM argument."""
        head = self._lark.literal(marks.GLM_KEY)
        middle = self._lark.literal(marks.GLM_KEY_END + marks.GLM_VALUE)
        value = self._glm_value(argument)
        return None if value is None else f"{head} {key} {middle} {value}"

    def _glm_value(self, argument: Argument) -> str | None:
        """Return the rule of a GLM value with its end mark: plain text, or JSON.

        Texts and scalars form one terminal with the end mark, because a lexer that has read 5
        cannot know whether a longer text follows. Arrays and objects differ from texts at their
        first character.
        """
        end = marks.GLM_VALUE_END
        parts, lark = argument.parts, self._lark
        if all(
            part is True or (isinstance(part, dict) and not constraints(part)) for part in parts
        ):
            text = self._texts.text((), _GLM_MARKS, frozenset(), may_be_json=True)
            return lark.text_until(end, text)
        kinds = self._schema.kinds(parts)
        read = self._types_read(argument)
        as_json = kinds & {"array", "object"}
        scalars = [self._texts.scalar(parts, kind) for kind in ("null", "boolean")]
        if argument.name in self._bounded:
            as_json |= kinds & {"number", "integer"}
        else:
            scalars.append(self._texts.scalar(parts, "number"))
        if "string" in kinds:
            preferred = read - _TEXT if read else KINDS
            has_bounds = argument.name in self._bounded
            scalars.append(self._texts.text(parts, _GLM_MARKS, preferred, has_bounds))
        terminals = [scalar for scalar in scalars if scalar is not None]
        forms = [lark.text_until(end, lark.terminal(" | ".join(terminals)))] if terminals else []
        if as_json:
            forms.append(f"{self._json(parts, as_json, compact=True)} {lark.literal(end)}")
        return lark.one_of(forms) if forms else None

    def _has_bounds(self, argument: Argument) -> bool:
        """Return True if an argument may be a number with bounds."""
        try:
            self._texts.scalar(argument.parts, "number")
        except BoundedNumberError:
            return True
        except SchemaError:
            # raised again with the name of the argument
            return False
        return False

    def _types_read(self, argument: Argument) -> frozenset[str]:
        """Return the types by which the parser reads an argument, empty for any type."""
        if argument.name is not None:
            return self._schema.argument_types(argument.name)
        # "" represents any name if all names have the same schema
        return self._schema.argument_types("") if self._is_uniform else frozenset()

    def _json(self, parts: Sequence[object], kinds: frozenset[str], compact: bool = False) -> str:
        """Return the rule for JSON of some types that satisfies all schemas."""
        parts = [plain_target(self._schema, part) for part in parts] or [True]
        key = (*map(id, parts), kinds, compact)
        if key not in self._documents:
            document = json_document(self._schema, parts, kinds)
            self._documents[key] = self._lark.json(document, compact)
        return self._documents[key]

    def _bodies(
        self,
        lists: Iterable[ArgumentList],
        names: re.Pattern[str],
        write: Callable[[str, Argument], str | None],
    ) -> list[str]:
        """Return expressions for the arguments of a call, one for each writable list.

        Args:
            names: names that the format can write.
            write: makes the rule of an argument from its key, or None if its value cannot be
                written.

        Raises:
            SchemaError: no list can be written.
        """
        bodies = []
        for each in lists:
            rules = []
            for argument in each.arguments:
                rule = self._argument(argument, names, write)
                if rule is not None:
                    rules.append((rule, argument))
                elif argument.is_required:
                    break
            else:
                body = self._sequence(rules, each)
                bodies += [] if body is None else [body]
        if not bodies:
            raise SchemaError("got a schema whose arguments the model's format cannot write")
        return bodies

    def _argument(
        self,
        argument: Argument,
        names: re.Pattern[str],
        write: Callable[[str, Argument], str | None],
    ) -> str | None:
        """Return the rule of one argument, or None if its name or value cannot be written."""
        if argument.name is None:
            regexes = [
                names.pattern,
                _SHORT_NAME,
                *([key_regex(self._schema, argument.pattern)] if argument.pattern else []),
            ]
            others = (key_regex(self._schema, other) for other in argument.other_patterns)
            without = [f"~{self._lark.regex(other)}" for other in others]
            key = self._lark.terminal(" & ".join([*map(self._lark.regex, regexes), *without]))
        elif names.fullmatch(argument.name):
            key = self._lark.literal(argument.name)
        else:
            return None
        try:
            body = write(key, argument)
        except SchemaError as error:
            where = "" if argument.name is None else f"argument {argument.name!r}: "
            raise SchemaError(f"{where}{error}") from error
        return None if body is None else self._lark.rule(body)

    def _sequence(self, rules: list[tuple[str, Argument]], of: ArgumentList) -> str | None:
        """Return an expression for arguments in order, or None if too few can be written."""
        if rules and rules[0][1].name is None:
            max_count = "" if of.max_count is None else of.max_count
            return f"({' | '.join(rule for rule, _ in rules)}){{{of.min_count},{max_count}}}"
        num_required = sum(argument.is_required for _, argument in rules)
        max_count = len(rules) if of.max_count is None else of.max_count
        if of.min_count <= num_required and max_count >= len(rules):
            # the bounds hold in any case, so the arguments need not be counted
            return " ".join(r if argument.is_required else f"{r}?" for r, argument in rules) or '""'
        # from the last argument backwards: number of arguments before it -> rule of the rest
        rest = {n: '""' for n in range(of.min_count, max_count + 1)}
        for rule, argument in reversed(rules):
            before = {}
            for n in range(len(rules) + 1):
                choices = [f"{rule} {rest[n + 1]}"] if n + 1 in rest else []
                choices += [rest[n]] if n in rest and not argument.is_required else []
                if choices:
                    before[n] = self._lark.one_of(choices)
            rest = before
        return rest.get(0)


def _is_optional(of: ArgumentList) -> bool:
    return not any(argument.is_required for argument in of.arguments)
