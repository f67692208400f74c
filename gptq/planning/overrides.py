"""Options of each layer: those of the config, then those of the overrides that name it."""

import re
from collections.abc import Collection, Iterable
from typing import Any

from gptq.config import Override, QuantConfig
from gptq.errors import InputError
from gptq.models.blocks import Block, group_fused_siblings
from gptq.planning.plan_notes import abbreviate


def resolve_layer_options(
    layers: Iterable[str], config: QuantConfig, left_out: Collection[str] = ()
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return bits, group_size, sym and skip of every layer, and notes for the user; layers in `left_out` are skipped.

    Siblings that engines fuse get the same options: an override that names some of them holds for all.

    Raises:
        InputError: an override names no layer, or overrides contradict each other on siblings.
    """
    layers = list(layers)
    defaults = {"bits": config.bits, "group_size": config.group_size, "sym": config.sym, "skip": False}
    options = {name: dict(defaults) for name in layers}
    extended: dict[Override, list[str]] = {}
    unused = list(config.overrides)
    for group in group_fused_siblings(layers):
        matched = {o: [n for n in group if re.search(o.pattern, n)] for o in config.overrides}
        matched = {override: members for override, members in matched.items() if members}
        _refuse_contradictions({o: members for o, members in matched.items() if len(members) < len(group)})
        for override, members in matched.items():
            for name in group:
                options[name] |= override.options()
            extended.setdefault(override, []).extend(n for n in group if n not in members)
        unused = [override for override in unused if override not in matched]
    if unused:
        raise InputError(f"the override '{unused[0]}' names no layer; a layer is called {layers[0]}, for example")
    for name in left_out:
        options[name]["skip"] = True
    reached = {o: [n for n in names if o.skip or not options[n]["skip"]] for o, names in extended.items()}
    return options, [_note_on_extension(override, names) for override, names in reached.items() if names]


def _refuse_contradictions(partial: dict[Override, list[str]]) -> None:
    """Check overrides that each name some of the same siblings.

    Raises:
        InputError: two overrides name different layers and set an option to different values.
    """
    seen: dict[str, Override] = {}
    for override, members in partial.items():
        for option, value in override.options().items():
            earlier = seen.setdefault(option, override)
            if earlier.options()[option] != value and not set(partial[earlier]) & set(members):
                raise InputError(
                    f"the overrides '{earlier}' and '{override}' differ in {option} of {partial[earlier][0]} and "
                    f"{members[0]}, which engines fuse into one layer; give both the same"
                )
            seen[option] = override


def _note_on_extension(override: Override, names: list[str]) -> str:
    also = abbreviate(names)
    return f"the override '{override}' holds for {also} as well, because engines fuse them with the layers it names"


def find_asked_for(overrides: Iterable[Override], blocks: Iterable[Block], unreached: Collection[str]) -> set[str]:
    """Return the layers that no input reaches but an override asks for: one that names such layers and no others."""
    asked: set[str] = set()
    layers = [name for block in blocks for name in block.linears]
    for override in overrides:
        named = {name for name in layers if re.search(override.pattern, name)}
        if not override.skip and named <= set(unreached):
            asked |= named
    return asked


def is_named(name: str, gates: Collection[str], layers: Iterable[str], config: QuantConfig) -> bool:
    """Whether an override names this gate, and nothing but gates."""
    named = (o for o in config.overrides if not o.skip and re.search(o.pattern, name))
    return any(all(layer in gates for layer in layers if re.search(o.pattern, layer)) for o in named)
