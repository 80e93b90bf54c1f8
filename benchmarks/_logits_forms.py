"""Forms of the indexer's tile kernel that are tried, and compiling them on all processors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from benchmarks._compiling import compile_all
from benchmarks._logits_shapes import PAGE, WIDTH, Shape
from fd_dsa.ops.indexer_logits.tile_forms import (
    TileForm,
    decode_form,
    padded_heads,
    prompt_form,
)

CHOSEN = "chosen"
# registers of a thread -> blocks of four warps that a processor then has
_BLOCKS = {255: 2, 168: 3, 128: 4, 96: 5}
_STAGES = (2, 4, 5)
_PROGRAMS = (1, 2, 8)


def form_of(shape: Shape) -> TileForm:
    """The form that serves a shape."""
    if shape.is_prompt:
        return prompt_form(shape.heads)
    return decode_form(shape.heads, shape.new)


def candidates(shape: Shape) -> Iterator[tuple[str, TileForm]]:
    """The form that serves, and forms that differ from it in one thing; none twice."""
    chosen = form_of(shape)
    tried = {chosen}
    yield CHOSEN, chosen
    for label, form in _others(chosen):
        if form not in tried:
            tried.add(form)
            yield label, form


def _others(chosen: TileForm) -> Iterator[tuple[str, TileForm]]:
    """Forms beside the chosen one, with what differs in words."""
    for registers, blocks in _BLOCKS.items():
        form = replace(chosen, maxnreg=registers, programs_per_processor=blocks)
        yield f"{registers} registers", form
    for stages in _STAGES:
        yield f"{stages} stages", replace(chosen, num_stages=stages)
    for blocks in _PROGRAMS:
        yield f"{blocks} programs", replace(chosen, programs_per_processor=blocks)
    first, half = chosen.first_tokens, max(chosen.first_tokens // 2, 1)
    for tokens in ((first, 0), (first, first), (2 * first, 0), (half, half)):
        for registers in (255, 168):
            form = TileForm(*tokens, maxnreg=registers, programs_per_processor=_BLOCKS[registers])
            yield f"{tokens[0]} + {tokens[1]} tokens, {registers} registers", form


def compile_form(heads: int, form: TileForm) -> str:
    """Compile a form for Hopper into Triton's cache; returns what the compiler said against it."""
    from fd_dsa.ops.indexer_logits.tile_kernel import tile_kernel
    from fd_dsa.triton_runtime import Pointer

    types = {"position_ids_ptr": "int64"}
    types |= dict.fromkeys(("q_ptr", "cache_ptr"), "uint8")
    types |= dict.fromkeys(("weights_ptr", "logits_ptr"), "float32")
    constants = {
        "NUM_HEADS": heads,
        "HEADS": padded_heads(heads),
        "WIDTH": WIDTH,
        "PAGE": PAGE,
        "FIRST": form.first_tokens,
        "REST": form.rest_tokens,
    }
    given = {
        name: Pointer(types.get(name, "int32")) if name.endswith("_ptr") else 7
        for name in tile_kernel.arg_names
        if name not in constants
    }
    options = {"num_warps": form.num_warps, "num_stages": form.num_stages, "maxnreg": form.maxnreg}
    try:
        tile_kernel.warmup(**given, **constants, **options, capability=90)
    except Exception as error:
        return f"{heads} heads, {form}: {str(error)[:100]}"
    return ""


def compile_ahead(shapes: Iterable[Shape]) -> None:
    """Compile all candidates of some shapes, a process for each processor."""
    work = {
        (shape.heads, replace(form, programs_per_processor=1))
        for shape in shapes
        for _, form in candidates(shape)
    }
    compile_all(compile_form, work)
