"""The fields of a request that constrain the form of its output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, PlainValidator, WithJsonSchema

from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from fd_dsa.serve.errors import ApiError, FieldError, show
from fd_dsa.serve.protocol.fields import MAX_ENTRIES, TEXT, TEXTS, Body, at_most, refuse
from fd_dsa.serve.protocol.known_fields import (
    IGNORED_STRUCTURED_OUTPUTS,
    JSON_SCHEMA_FIELDS,
    RESPONSE_FORMAT_FIELDS,
)

# field of FastDeploy and older vLLM -> form of StructuredOutputsParams
_GUIDED = {
    "guided_json": "json",
    "guided_json_object": "json_object",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
_FORMS = tuple(_GUIDED.values())


def _response_format(value: Any) -> dict[str, Any] | None:
    """Return the form of `response_format`, in the notation of any server.

    OpenAI, vLLM and SGLang put the schema into `json_schema.schema`. llama.cpp and hosted APIs put
    it into `schema`, with type json_object or json_schema. The client of Hugging Face puts it into
    `value`, with type json_object.
    """
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in RESPONSE_FORMAT_FIELDS:
        types = ", ".join(RESPONSE_FORMAT_FIELDS)
        raise refuse(f"got {show(value)}; allowed is an object of type {types}")
    _check_names(value, ("type", *RESPONSE_FORMAT_FIELDS[kind]), f"of type {kind} ")
    wrapper = value.get("json_schema")
    given = [value.get("schema"), value.get("value")]
    if wrapper is not None:
        if not isinstance(wrapper, dict):
            raise refuse(f"got {show(wrapper)} as json_schema; allowed is an object with a schema")
        _check_names(wrapper, JSON_SCHEMA_FIELDS, "has a json_schema that ")
        given.append(wrapper.get("schema"))
    schemas = [schema for schema in given if schema is not None]
    if len(schemas) > 1:
        raise refuse("has a schema twice; send json_schema.schema or schema")
    schema = schemas[0] if schemas else None
    if schema is None and kind != "json_schema":
        return {"json_object": True} if kind == "json_object" else None
    if not isinstance(schema, dict):
        raise refuse(
            f"got {show(value)}; json_schema must be an object with a schema, which is an object"
        )
    return {"json": schema}


def _check_names(value: dict[str, object], allowed: Sequence[str], what: str) -> None:
    """Refuse an unknown field with a value."""
    for name, field in value.items():
        if field is not None and name not in allowed:
            raise refuse(f"{what}has the field {show(name)}; allowed are {', '.join(allowed)}")


def _structured_outputs(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise refuse(f"got {show(value)}; allowed is an object with one of {', '.join(_FORMS)}")
    requested = {
        name: form
        for name, form in value.items()
        if form not in (None, False) and name not in IGNORED_STRUCTURED_OUTPUTS
    }
    _check_names(requested, _FORMS, "")
    if not requested:
        raise refuse(f"has no form; give one of {', '.join(_FORMS)}")
    return requested


def _json_schema(value: object) -> dict[str, Any] | str:
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
                "type": {"type": "string", "enum": list(RESPONSE_FORMAT_FIELDS)},
                "json_schema": {**_OBJECT, "properties": {"schema": _OBJECT}},
                "schema": _OBJECT,
                "value": _OBJECT,
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
    """Forms of an output, of which a request may have one. A refusal names the field."""

    response_format: _ResponseFormat | None = Field(
        None, description="Of type text, json_object, or with a schema json_schema."
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
        """Return the form of the output, or None for any text.

        Raises:
            ApiError: 400 for two forms, or a form with a wrong type or size.
        """
        forms = {
            "response_format": self.response_format,
            "structured_outputs": self.structured_outputs,
        }
        for field, kind in _GUIDED.items():
            value = getattr(self, field)
            forms[field] = {kind: value} if value not in (None, False) else None
        requested = {name: form for name, form in forms.items() if form is not None}
        if not requested:
            return None
        if len(requested) > 1:
            first, second, *_ = requested
            raise FieldError(f"{second}: given with {first}; an answer has one form")
        ((name, form),) = requested.items()
        try:
            return StructuredOutputsParams(**form, source=name)
        except ValueError as error:
            raise ApiError(400, str(error), param=name) from error


STRUCTURED_FIELDS = tuple(StructuredFields.model_fields)
