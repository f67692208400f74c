"""Worker of bench_generate.py and check_llama_cpp.py in llama.cpp's environment: load a GGUF file and run it.

python llama_cpp_worker.py FILE.gguf THREADS            answer lines of JSON from stdin on stdout:
    {"prompt": [tokens], "tokens": N, "cpu": whether seconds are the CPU's}
                                       ->  {"decode": tokens per second, "prefill": tokens per second}
    {"logits": [tokens]}               ->  {"logits": the last token's}
    {"all_logits": [tokens], "file": F.npy}  ->  {}, and the logits of all tokens, (tokens, vocabulary), in the file
    {"text": T}                        ->  {"tokens": the numbers of its tokens, without a first or last one added}
"""

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

CONTEXT = 1024


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
        now = time.process_time if asked.get("cpu") else time.perf_counter
        began = now()
        self.run(asked["prompt"])
        prefill = len(asked["prompt"]) / (now() - began)
        self.forget()
        token = int(self.run(asked["prompt"][:8]).argmax())
        began = now()
        for _ in range(asked["tokens"] - 1):
            token = int(self.run([token]).argmax())
        return {"decode": (asked["tokens"] - 1) / (now() - began), "prefill": prefill}


def main() -> None:
    file, threads = sys.argv[1:]
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    served = Served(Path(file), int(threads))
    for line in sys.stdin:
        print(json.dumps(served.answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
