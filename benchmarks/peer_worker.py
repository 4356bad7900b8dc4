"""One engine of `peers.py` in a process of its own: `python peer_worker.py NAME MODELS_JSON`.

Prints {"version": ...} or {"error": ...} once it is ready, then answers every line {"ids",
"new_tokens"} with {"tokens", "seconds"}. Imports nothing of an engine but the one it runs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable

Decode = Callable[[list[int], int], list[int]]
THREADS = len(os.sched_getaffinity(0))


def mtd_jax(models: dict[str, str]) -> tuple[str, Decode]:
    """This project."""
    import mtd_jax as mtd

    model = mtd.load(models["native"], dtype=models["dtype"])
    method = mtd.methods.autoregressive()

    def decode(ids: list[int], new_tokens: int) -> list[int]:
        done = mtd.generate(model, method, ids, max_new_tokens=new_tokens, ignore_eos=True)
        return list(done[0].token_ids)

    import jax

    return f"jax {jax.__version__}", decode


def transformers(models: dict[str, str]) -> tuple[str, Decode]:
    """transformers on torch."""
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        models["hf"], dtype=getattr(torch, models["dtype"])
    ).eval()

    def decode(ids: list[int], new_tokens: int) -> list[int]:
        inputs = torch.tensor([ids])
        with torch.inference_mode():
            out = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                eos_token_id=None,
                do_sample=False,
                pad_token_id=0,
            )
        return out[0, len(ids) :].tolist()

    return transformers.__version__, decode


def ctranslate2(models: dict[str, str]) -> tuple[str, Decode]:
    """CTranslate2; the model is converted on the way."""
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    if models["dtype"] != "float32":
        raise RuntimeError("compared in float32 only")
    TransformersConverter(models["hf"]).convert(models["ct2"], quantization="float32", force=True)
    generator = ctranslate2.Generator(
        models["ct2"], device="cpu", compute_type="float32", intra_threads=THREADS
    )
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(models["hf"])

    def decode(ids: list[int], new_tokens: int) -> list[int]:
        result = generator.generate_batch(
            [tokenizer.convert_ids_to_tokens(ids)],
            max_length=new_tokens,
            min_length=new_tokens,
            beam_size=1,
            include_prompt_in_result=False,
            end_token=[],
        )
        return list(result[0].sequences_ids[0])

    return ctranslate2.__version__, decode


def llama_cpp(models: dict[str, str]) -> tuple[str, Decode]:
    """llama.cpp through llama-cpp-python."""
    import llama_cpp

    if not models["gguf"]:
        raise RuntimeError("needs --gguf")
    model = llama_cpp.Llama(models["gguf"], n_ctx=2048, n_threads=THREADS, verbose=False)

    def decode(ids: list[int], new_tokens: int) -> list[int]:
        model.reset()
        tokens: list[int] = []
        for token in model.generate(ids, temp=0.0, repeat_penalty=1.0, reset=True):
            tokens.append(int(token))
            if len(tokens) == new_tokens:
                break
        return tokens

    return llama_cpp.__version__, decode


def main() -> None:
    """Serves one engine until its input ends."""
    make = {f.__name__: f for f in (mtd_jax, transformers, ctranslate2, llama_cpp)}[sys.argv[1]]
    # Engines print what they like; the answers go out on the real stdout alone.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        version, decode = make(json.loads(sys.argv[2]))
    except ImportError as error:
        print(json.dumps({"error": f"not installed ({error.name})"}), file=out, flush=True)
        return
    except RuntimeError as error:
        print(json.dumps({"error": str(error)}), file=out, flush=True)
        return
    print(json.dumps({"version": version}), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        began = time.perf_counter()
        tokens = decode(request["ids"], request["new_tokens"])
        seconds = time.perf_counter() - began
        print(json.dumps({"tokens": tokens, "seconds": seconds}), file=out, flush=True)


if __name__ == "__main__":
    main()
