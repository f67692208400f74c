"""The configuration classes registered with transformers (see `hf_registration`).

They keep every option of a file as it is stored. transformers' own drop those of single layers, or need the package of
the tool that wrote the file. This module is imported while transformers itself is, so it imports little.
"""

from typing import Any

import transformers

# transformers requires optimum if it sees this option. It is redundant: the tensors show which layers are packed.
OPTIMUM_OPTION = "modules_in_block_to_quantize"


class GPTQConfig(transformers.GPTQConfig):
    """transformers' class, with all options of the file."""

    def __init__(self, bits: int, **options: Any) -> None:
        super().__init__(bits, **{key: value for key, value in options.items() if key != OPTIMUM_OPTION})
        self.stored_options: dict[str, Any] = {"bits": bits, **options}

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": str(self.quant_method.value), **self.stored_options}


class _Stored:
    """Stands for a class of transformers, the next base, where this package reads the file; needs no other package."""

    gives_way = True  # to that class, for a file that this package does not read

    def __init__(self, **options: Any) -> None:
        self.quant_method = options["quant_method"]
        self.stored_options = options

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Return a configuration of this class, or of transformers' for a file that this package does not read.

        Raises:
            InputError: transformers would load the file and not compute what it asks for, or does not know its method.
        """
        from gptq.errors import InputError, UnknownOptionError
        from gptq.formats.quantization_config import read_quantization

        try:
            read_quantization("config.json", config_dict)
        except InputError as error:
            if isinstance(error, UnknownOptionError) or not cls.gives_way:
                raise
            theirs: Any = cls.__bases__[1]
            return theirs.from_dict(config_dict, return_unused_kwargs, **kwargs)
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def get_loading_attributes(self) -> dict[str, Any]:
        return {}

    def to_dict(self) -> dict[str, Any]:
        return dict(self.stored_options)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class CompressedTensorsConfig(_Stored, transformers.CompressedTensorsConfig): ...


class MlxConfig(CompressedTensorsConfig):
    """For the files of MLX, which transformers does not know."""

    gives_way = False


class AutoRoundConfig(_Stored, transformers.AutoRoundConfig): ...


class Fp8Config(_Stored, transformers.FineGrainedFP8Config): ...


BY_METHOD = {  # by `quant_method`
    "gptq": GPTQConfig,
    "compressed-tensors": CompressedTensorsConfig,
    "fp8": Fp8Config,
    "mlx": MlxConfig,
    "auto-round": AutoRoundConfig,
}
