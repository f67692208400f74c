"""Worker of bench_generate.py and check_llama_cpp.py in llama.cpp's environment: convert a Llama, load files, run them.

    python llama_cpp_worker.py make MODEL OUT TYPE [TYPE ...]     write OUT/TYPE.gguf for each of Q4_0, Q4_K_S, ...
    python llama_cpp_worker.py serve FILE.gguf THREADS            answer lines of JSON from stdin on stdout:
        {"prompt": [tokens], "tokens": N}  ->  {"decode": tokens per second, "prefill": tokens per second}
        {"logits": [tokens]}               ->  {"logits": the last token's}
        {"all_logits": [tokens], "file": F.npy}  ->  {}, and the logits of all tokens, (tokens, vocabulary), in the file
        {"text": T}                        ->  {"tokens": the numbers of its tokens, without a first or last one added}

All matrices have the given type, including the embedding and the output head ("pure"). Files have no tokenizer.
"""

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from gguf import GGUFWriter

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
CONTEXT = 1024


def write_f16(model: Path, file: Path) -> None:
    """Convert a Llama with tied embeddings to a GGUF file of float16 matrices."""
    from safetensors import safe_open

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    with safe_open(model / "model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - it is no mapping
            values = tensors.get_tensor(name).float().numpy()
            if values.ndim == 2:
                values = values.astype(np.float16)
            stored = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
            if name not in stored:
                _, _, block, own = name.removesuffix(".weight").split(".", 3)
                stored[name] = f"blk.{block}.{NAMES[own]}.weight"
                if own in ("self_attn.q_proj", "self_attn.k_proj"):  # llama.cpp rotates neighbouring dimensions
                    count = heads if own.endswith("q_proj") else kv_heads
                    pairs = values.reshape(count, 2, -1, values.shape[1])
                    values = np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(values.shape))
            writer.add_tensor(stored[name], values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make(model: Path, out: Path, kinds: list[str]) -> None:
    """Write the model as F16.gguf, and quantize that to each type."""
    whole = out / "F16.gguf"
    write_f16(model, whole)
    for kind in kinds:
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.pure = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), True
        matrices = getattr(llama_cpp, f"GGML_TYPE_{kind.removesuffix('_S')}")
        options.output_tensor_type = options.token_embedding_type = matrices
        if llama_cpp.llama_model_quantize(str(whole).encode(), str(out / f"{kind}.gguf").encode(), options):
            raise RuntimeError(f"llama.cpp could not make {kind}")


class Served:
    """A model loaded in llama.cpp through its C interface."""

    def __init__(self, file: Path, threads: int) -> None:
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), options)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {file}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = CONTEXT, CONTEXT, 512
        context.n_threads = context.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def run(self, tokens: list[int]) -> Any:
        """Run tokens after those run before; return the last token's logits (vocabulary,)."""
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama.cpp could not run the tokens")
        found = llama_cpp.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(found, shape=(self.vocabulary,))

    def run_all(self, tokens: list[int]) -> Any:
        """Return the logits of all tokens (tokens, vocabulary)."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = 0
        if llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError("llama.cpp could not run the tokens")
        rows = [llama_cpp.llama_get_logits_ith(self.context, place) for place in range(len(tokens))]
        found = np.stack([np.ctypeslib.as_array(row, shape=(self.vocabulary,)).copy() for row in rows])
        llama_cpp.llama_batch_free(batch)
        return found

    def tokenize(self, text: str) -> list[int]:
        content = text.encode()
        room = (ctypes.c_int32 * (len(content) + 8))()
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        count = llama_cpp.llama_tokenize(vocabulary, content, len(content), room, len(room), False, False)
        return list(room[:count])

    def forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Answer one request, from an empty context."""
        self.forget()
        if "logits" in asked:
            return {"logits": self.run(asked["logits"]).tolist()}
        if "all_logits" in asked:
            np.save(asked["file"], self.run_all(asked["all_logits"]))
            return {}
        if "text" in asked:
            return {"tokens": self.tokenize(asked["text"])}
        began = time.perf_counter()
        self.run(asked["prompt"])
        prefill = len(asked["prompt"]) / (time.perf_counter() - began)
        self.forget()
        token = int(self.run(asked["prompt"][:8]).argmax())
        began = time.perf_counter()
        for _ in range(asked["tokens"] - 1):
            token = int(self.run([token]).argmax())
        return {"decode": (asked["tokens"] - 1) / (time.perf_counter() - began), "prefill": prefill}


def main() -> None:
    command, *arguments = sys.argv[1:]
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    if command == "make":
        make(Path(arguments[0]), Path(arguments[1]), arguments[2:])
        return
    served = Served(Path(arguments[0]), int(arguments[1]))
    for line in sys.stdin:
        print(json.dumps(served.answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
