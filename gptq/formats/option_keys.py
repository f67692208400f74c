"""What a GPTQ or AWQ `quantization_config` may say besides the options that are read, and what it may not.

A key that is not known may change what the tensors mean, so it is refused by name. Known keys are those that these
tools write: AutoGPTQ to 0.7, AutoAWQ to 0.2, GPTQModel 0.9 to 7.7, optimum and transformers to 5.23, AutoRound to 0.16
when it exports to GPTQ or AWQ.
"""

from collections.abc import Mapping
from typing import Any

from gptq.errors import UnknownOptionError

READ = "quant_method bits group_size sym desc_act checkpoint_format format dynamic meta"
# How a file was made, which layers are packed (the tensors show it), and how a tool is to run it.
GPTQMODEL = (  # and AutoGPTQ
    "damp_percent damp_auto_increment static_groups true_sequential model_name_or_path model_file_base_name lm_head "
    "mse parallel_packing act_group_aware hyb_act pack_impl device offload_to_disk offload_to_disk_path v2 v2_alpha "
    "v2_memory_device gptaq gptaq_alpha gptaq_memory_device foem fail_safe fallback hessian_chunk_size "
    "mock_quantization buffered_fwd use_marlin uri quantizer"
)
TRANSFORMERS = (  # and optimum
    "tokenizer dataset batch_size pad_token_id model_seqlen max_input_length cache_block_outputs backend "
    "block_name_to_quantize module_name_preceding_first_block modules_in_block_to_quantize modules_to_not_convert "
    "use_exllama disable_exllama exllama_config use_cuda_fp16"
)
AUTO_ROUND = (
    "amp enable_minmax_tuning enable_norm_bias_tuning enable_quanted_input gradient_accumulate_steps iters lr "
    "minmax_lr low_gpu_mem_usage nsamples seqlen scale_dtype supported_types to_quant_block_names quant_block_list "
    "regex_config extra_config provider autoround_version act_group_size act_sym act_data_type act_dynamic "
    "packing_format super_group_size static_attention_dtype static_kv_dtype static_attention_granularity "
    "static_kv_granularity"
)
AWQ = "zero_point version do_fuse fuse_max_seq_len modules_to_fuse"
KNOWN = frozenset(" ".join((READ, GPTQMODEL, TRANSFORMERS, AUTO_ROUND, AWQ)).split())
EMPTY = {  # keys that may only say nothing, and what they ask for otherwise
    "is_marlin_format": "words in the order of a kernel",
    "adapter": "a correction from an adapter",
    "rotation": "inputs that are rotated while the model runs",
    "rotation_config": "inputs that are rotated while the model runs",
    "rotation_configs": "inputs that are rotated while the model runs",
    "spinquant_config": "inputs that are rotated while the model runs",
    "transform_config": "inputs that are rotated while the model runs",
    "activation": "inputs of layers that are rounded while the model runs",
    "super_bits": "scales that are quantized themselves",
}
ONLY: dict[str, tuple[str, ...]] = {"pack_dtype": ("int32",), "data_type": ("int",), "method": ("gptq", "awq")}
FLOAT_BITS = 16  # of activations that are not rounded


def check_keys(where: str, options: Mapping[str, Any]) -> None:
    """Check a `quantization_config`, or the options of one of its `dynamic` rules. A key without a value says nothing.

    Raises:
        UnknownOptionError: a key is not known, or asks for what is not computed here; the message names it.
    """
    for key, value in options.items():
        if value is None or key in KNOWN:
            continue
        if key == "act_bits" and isinstance(value, int) and value >= FLOAT_BITS:
            continue
        if key == "act_bits" or (key in EMPTY and value):
            asked = EMPTY.get(key, EMPTY["activation"])
            raise UnknownOptionError(f"{where} says {key} {str(value)[:80]!r}: {asked}, which is not computed here")
        if key in ONLY and value not in ONLY[key]:
            raise UnknownOptionError(
                f"{where} says {key} {str(value)[:80]!r}; what is read is {' or '.join(ONLY[key])}"
            )
        if key not in EMPTY and key not in ONLY:
            raise UnknownOptionError(
                f"{where} has the key {key!r}, which is not known of GPTQ or AWQ files and may change what their "
                "tensors mean; if it does not, remove it there"
            )
