"""The fields of a request that give its output a form."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator, WithJsonSchema

from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from fd_dsa.serve.errors import ApiError, FieldError, show
from fd_dsa.serve.protocol.fields import MAX_ENTRIES, TEXT, TEXTS, Body, at_most, refuse

# field of FastDeploy and older vLLM -> form of StructuredOutputsParams
_GUIDED = {
    "guided_json": "json",
    "guided_json_object": "json_object",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
_FORMS = tuple(_GUIDED.values())
_TYPES = ("text", "json_object", "json_schema")


def _response_format(value: Any) -> dict[str, Any] | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in _TYPES:
        raise refuse(f"got {show(value)}; allowed is an object of type {', '.join(_TYPES)}")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    wrapper = value.get("json_schema")
    schema = wrapper.get("schema") if isinstance(wrapper, dict) else None
    if not isinstance(schema, dict):
        raise refuse(
            f"got {show(value)}; json_schema must be an object with a schema, which is an object"
        )
    return {"json": schema}


def _structured_outputs(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise refuse(f"got {show(value)}; allowed is an object with one of {', '.join(_FORMS)}")
    asked = {name: form for name, form in value.items() if form not in (None, False)}
    unknown = [name for name in asked if name not in _FORMS]
    if unknown:
        raise refuse(f"has {show(unknown[0])}; allowed is one of {', '.join(_FORMS)}")
    if not asked:
        raise refuse(f"asks for nothing; give one of {', '.join(_FORMS)}")
    return asked


def _json_schema(value: Any) -> dict[str, Any] | str:
    if isinstance(value, (dict, str)):
        return value
    raise refuse(f"got {show(value)}; allowed is a JSON schema, an object or its text")


_OBJECT: dict[str, Any] = {"type": "object"}
_JsonSchema = Annotated[
    dict[str, Any] | str,
    PlainValidator(_json_schema),
    WithJsonSchema({"anyOf": [_OBJECT, TEXT]}),
]
_ResponseFormat = Annotated[
    dict[str, Any] | None,
    PlainValidator(_response_format),
    WithJsonSchema(
        {
            **_OBJECT,
            "properties": {
                "type": {"type": "string", "enum": list(_TYPES)},
                "json_schema": {**_OBJECT, "properties": {"schema": _OBJECT}},
            },
            "required": ["type"],
        }
    ),
]
_StructuredOutputs = Annotated[
    dict[str, Any],
    PlainValidator(_structured_outputs),
    WithJsonSchema(
        {
            **_OBJECT,
            "properties": {
                "json": {"anyOf": [_OBJECT, TEXT]},
                "json_object": {"type": "boolean"},
                "regex": TEXT,
                "choice": TEXTS,
                "grammar": TEXT,
            },
        }
    ),
]


class StructuredFields(Body):
    """Forms of an output, at most one; a refusal names the field of the form."""

    response_format: _ResponseFormat | None = Field(
        None, description="Of type text, json_object, or json_schema with the schema."
    )
    structured_outputs: _StructuredOutputs | None = Field(
        None, description="One of json, json_object, regex, choice, grammar, as in vLLM."
    )
    guided_json: _JsonSchema | None = Field(None, description="A JSON schema.")
    guided_json_object: bool | None = Field(None, description="Any JSON object.")
    guided_regex: str | None = Field(None, description="A regular expression, in Rust's syntax.")
    guided_choice: Annotated[list[str], at_most(MAX_ENTRIES)] | None = Field(
        None, description="The answer is one of these."
    )
    guided_grammar: str | None = Field(None, description="A grammar in Lark's notation or GBNF.")

    def structured_params(self) -> StructuredOutputsParams | None:
        """The form of the output, None for any text.

        Raises:
            ApiError: 400, there are two of them, or one is of another type or too large.
        """
        forms = {
            "response_format": self.response_format,
            "structured_outputs": self.structured_outputs,
        }
        for field, kind in _GUIDED.items():
            value = getattr(self, field)
            forms[field] = {kind: value} if value not in (None, False) else None
        asked = {name: form for name, form in forms.items() if form is not None}
        if not asked:
            return None
        if len(asked) > 1:
            first, second, *_ = asked
            raise FieldError(f"{second}: given beside {first}; an answer has one form")
        ((name, form),) = asked.items()
        try:
            return StructuredOutputsParams(**form, source=name)
        except ValueError as error:
            raise ApiError(400, str(error), param=name) from error


STRUCTURED_FIELDS = tuple(StructuredFields.model_fields)
