"""`gptq plan`: say what a run would do, and what it would take."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gptq.calibration.arrays import Inputs, is_arrays
from gptq.calibration.windows import PROCESSED_WINDOWS, held_out_windows, read_calibration
from gptq.cli.early import read_config
from gptq.cli.printing import format_bytes, print_engines, print_json
from gptq.config import QuantConfig
from gptq.errors import InputError
from gptq.formats import compatibility
from gptq.models.hf_config import choose_device, choose_dtype, fit_seq_len
from gptq.pipeline.search import MIN_WINDOWS
from gptq.planning import cost, memory
from gptq.planning.bit_allocation import choose_storage, find_units
from gptq.planning.device_models import DEVICE_MODELS
from gptq.planning.plan import Plan, plan_checkpoint, refuse_other_grids
from gptq.planning.shares import count_shares

CHOSEN_LATER = (
    "the run measures what width and group size each layer needs; layers, engines and seconds are said here for one "
    "width for all, without that"
)


def run_plan(args: argparse.Namespace) -> int:
    """Run the command with its arguments; return the exit code."""
    config = read_config(args)
    windows = _read_inputs(args, config)
    plan = plan_checkpoint(
        args.model, config, args.revision, args.trust_remote_code, windows[0] if windows else None,
        allow_pickle=args.allow_pickle,
    )  # fmt: skip
    refuse_other_grids(plan, getattr(args, "also", ()))
    if config.chooses_widths:
        choose_storage(plan, config, *find_units(plan, config))  # refuses an impossible target
    tokens = _size_of_calibration(config, plan, windows)
    found = compatibility.engines(plan.stored_layers, plan.hf_config.model_type)
    layers = list(plan.layers.values())
    divided = _divide(args, config, plan, tokens) if args.ranks is not None else {}
    needs = _estimate_needs(args, config, plan, tokens)
    limit = [] if tokens.windows == 0 or windows else fit_seq_len(config.seq_len, plan.hf_config, plan.network)[1]
    notes = [*plan.notes, *limit, *([CHOSEN_LATER] if config.chooses_widths else [])]
    if args.json:
        print_json(
            {
                "kept_share": plan.kept_share,
                "format": layers[0].format,
                "bits_per_weight": plan.bits_per_weight,
                "tensor_bytes": sum(info.nbytes for info in plan.tensors.values()),
                "layers": [layer.to_dict() for layer in layers],
                "engines": [vars(engine) for engine in found],
                "notes": notes,
                "file_bytes": plan.file_bytes,
                **needs,
                **({"ranks": divided} if divided else {}),
            }
        )
        return 0
    width = max(len(layer.name) for layer in layers)
    print(f"{100 * plan.kept_share:.1f} % of the parameters stay unquantized")
    print(f"{'layer':{width}}  bits  group   sym  outputs x inputs")
    for layer in layers:
        shape = f"{layer.outputs} x {layer.inputs}"
        print(f"{layer.name:{width}}  {layer.bits:4}  {layer.group_size:5}  {_yes_or_no(layer.sym)}  {shape:>16}")
    total = format_bytes(sum(info.nbytes for info in plan.tensors.values()))
    print(f"{len(layers)} layers at {plan.bits_per_weight:.2f} bits per weight, {total} in all, as {layers[0].format}")
    print(needs["memory"])
    print(
        f"about {needs['seconds']:,.0f} s: {needs['operations'] / 1e12:,.2f} Tflop, and this machine was measured "
        f"to do {needs['rate'] / 1e9:,.0f} G a second in float32"
    )
    if divided:
        _print_divided(divided)
    for note in notes:
        print(f"note: {note}")
    print_engines(found)
    return 0


def _read_inputs(args: argparse.Namespace, config: QuantConfig) -> list[Inputs] | None:
    """Return the inputs of all windows, if the calibration data is there and may be other than text.

    Of images and sound the first stands for all, because preparing them takes long.
    """
    if not Path(args.calibration).exists():
        return None
    whole = is_arrays(args.calibration)
    read = config if whole else replace(config, num_samples=1)
    found = read_calibration(args.calibration, read, args.model, args.revision, args.trust_remote_code).inputs
    if whole or found is None:
        return found
    return found * (PROCESSED_WINDOWS if config.num_samples == "auto" else config.num_samples)


def _estimate_needs(args: argparse.Namespace, config: QuantConfig, plan: Plan, tokens: memory.Tokens) -> dict[str, Any]:
    """Estimate memory and time of a run, the time from measuring this machine for a few seconds."""
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, plan.hf_config, device)
    choice, says = memory.decide_memory(
        plan, config, tokens, device, dtype, args.batch_size, args.memory_limit, args.gpu_memory_limit
    )
    work, rates = cost.count_work(plan, config, tokens), cost.measure_rates(config, device, dtype)
    return {
        "memory": says,
        "peak_bytes": choice.peak,
        "in_flight": choice.in_flight,
        "activations_in_files": choice.on_disk,
        "wide_hessians_in_files": choice.wide_on_disk,
        "seconds": work.seconds(rates),
        "operations": work.total,
        "rate": rates.solver,
    }


def _size_of_calibration(config: QuantConfig, plan: Plan, inputs: list[Inputs] | None) -> memory.Tokens:
    if config.method != "gptq":
        return memory.Tokens(0, 0, 0)
    if inputs:
        return memory.size_of_windows(
            inputs, len(held_out_windows(len(inputs))), next(iter(plan.layers.values())).inputs
        )
    windows = MIN_WINDOWS if config.num_samples == "auto" else config.num_samples
    length, _ = fit_seq_len(config.seq_len, plan.hf_config, plan.network)
    return memory.Tokens(windows, length, len(held_out_windows(windows)))


def _divide(args: argparse.Namespace, config: QuantConfig, plan: Plan, tokens: memory.Tokens) -> dict[str, Any]:
    """Count what each of --ranks processes does on a device of --device-model.

    Raises:
        InputError: there are fewer windows than processes, or none.
    """
    device = DEVICE_MODELS[args.device_model]
    if config.method != "gptq":
        raise InputError("round-to-nearest has no calibration to divide; leave --ranks out")
    if args.ranks > tokens.windows:
        raise InputError(f"{tokens.windows} calibration windows cannot be shared by {args.ranks} processes")
    found = count_shares(plan, config, tokens, args.ranks, torch.bfloat16)
    return {
        "count": args.ranks,
        "device_model": args.device_model,
        "peak_bytes": found.peak,
        "device_bytes": device.memory,
        "received_bytes": found.received,
        "read_bytes": found.read,
        "seconds": found.seconds(device),
        "seconds_standing_still": found.standing_still(device),
    }


def _print_divided(found: dict[str, Any]) -> None:
    received, seconds = found["received_bytes"], found["seconds"]
    print(
        f"each of {found['count']} processes, by arithmetic for {found['device_model']} (not measured): "
        f"{format_bytes(found['peak_bytes'])} of {format_bytes(found['device_bytes'])} of memory, reads "
        f"{format_bytes(found['read_bytes'])}, receives {format_bytes(sum(received.values()))} ("
        + ", ".join(f"{kind} {format_bytes(nbytes)}" for kind, nbytes in received.items())
        + f"), works {sum(seconds.values()):,.0f} s ("
        + ", ".join(f"{stage} {spent:,.0f}" for stage, spent in seconds.items())
        + f"), of which {found['seconds_standing_still']:,.0f} s would not be less with more processes"
    )


def _yes_or_no(value: bool) -> str:
    return " yes" if value else "  no"
