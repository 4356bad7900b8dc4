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
from typing import Any

Models = dict[str, Any]
Decode = Callable[[list[int], int], list[int]]
THREADS = len(os.sched_getaffinity(0))
LONGEST = 4096
"""Tokens of prompt and answer that engines with a fixed cache make room for."""


def mtd_jax(models: Models, drafts: str) -> tuple[str, Decode]:
    """This project; `drafts` as in `mtd bench --methods`."""
    import jax

    import mtd_jax as mtd
    from mtd_jax.cli.arguments import parse_options
    from mtd_jax.cli.session import choose_method

    model = mtd.load(models["native"], dtype=models["dtype"])
    name, *options = (drafts or "ar").split(":")
    method = choose_method(name, None, parse_options(options), drafts).made(model)

    def decode(ids: list[int], new_tokens: int) -> list[int]:
        done = mtd.generate(model, method, ids, max_new_tokens=new_tokens)
        return list(done[0].token_ids)

    return f"jax {jax.__version__}", decode


def transformers(models: Models, drafts: str) -> tuple[str, Decode]:
    """transformers on torch."""
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        models["hf"], dtype=getattr(torch, models["dtype"])
    ).eval()
    more = _drafting(drafts, {"prompt_lookup": {"prompt_lookup_num_tokens": 10}})

    def decode(ids: list[int], new_tokens: int) -> list[int]:
        inputs = torch.tensor([ids])
        with torch.inference_mode():
            out = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=new_tokens,
                eos_token_id=models["ends"],
                do_sample=False,
                pad_token_id=models["ends"][0],
                **more,
            )
        return out[0, len(ids) :].tolist()

    return transformers.__version__, decode


def ctranslate2(models: Models, drafts: str) -> tuple[str, Decode]:
    """CTranslate2; the model is converted on the way."""
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    if models["dtype"] != "float32":
        raise RuntimeError("compared in float32 only")
    _drafting(drafts, {})
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
            beam_size=1,
            include_prompt_in_result=False,
            end_token=models["ends"],
        )
        return list(result[0].sequences_ids[0])

    return ctranslate2.__version__, decode


def llama_cpp(models: Models, drafts: str) -> tuple[str, Decode]:
    """llama.cpp through llama-cpp-python; the file is dequantised on the way."""
    import llama_cpp
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    if not models["gguf"]:
        raise RuntimeError("needs --gguf")
    if models["dtype"] != "float32":
        raise RuntimeError("compared in float32 only")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
    plain = os.path.join(models["scratch"], "float32.gguf")
    if llama_cpp.llama_model_quantize(models["gguf"].encode(), plain.encode(), params):
        raise RuntimeError(f"cannot dequantise {models['gguf']}")
    # What its documentation advises on CPUs.
    known = {"prompt_lookup": {"draft_model": LlamaPromptLookupDecoding(num_pred_tokens=2)}}
    model = llama_cpp.Llama(
        plain,
        n_ctx=LONGEST,
        n_threads=THREADS,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
        **_drafting(drafts, known),
    )

    def decode(ids: list[int], new_tokens: int) -> list[int]:
        model.reset()
        tokens: list[int] = []
        for token in model.generate(ids, temp=0.0, repeat_penalty=1.0, reset=True):
            tokens.append(int(token))
            if len(tokens) == new_tokens or token in models["ends"]:
                break
        return tokens

    return llama_cpp.__version__, decode


def vllm(models: Models, drafts: str) -> tuple[str, Decode]:
    """vLLM's build for CPUs, in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import vllm

    lookup = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
    engine = vllm.LLM(
        models["hf"],
        dtype=models["dtype"],
        max_model_len=LONGEST,
        max_num_seqs=1,
        enable_prefix_caching=False,
        **_drafting(drafts, {"ngram": {"speculative_config": lookup}}),
    )

    def decode(ids: list[int], new_tokens: int) -> list[int]:
        done = engine.generate(
            [{"prompt_token_ids": ids}],
            vllm.SamplingParams(
                temperature=0.0, max_tokens=new_tokens, stop_token_ids=models["ends"]
            ),
            use_tqdm=False,
        )
        return list(done[0].outputs[0].token_ids)

    return vllm.__version__, decode


def _drafting(name: str, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The arguments by which an engine drafts in this way; none for none."""
    if name and name not in known:
        raise RuntimeError(f"no way of drafting '{name}'")
    return known.get(name, {})


def main() -> None:
    """Serves one engine until its input ends."""
    name, _, drafts = sys.argv[1].partition(":")
    make = {f.__name__: f for f in (mtd_jax, transformers, ctranslate2, llama_cpp, vllm)}[name]
    models = json.loads(sys.argv[2])
    # Engines print what they like; the answers go out on the real stdout alone.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        version, decode = make(models, drafts)
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
        try:
            tokens = decode(request["ids"], request["new_tokens"])
        except Exception as error:  # whatever an engine raises: it is left out by name
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=out, flush=True)
            return
        seconds = time.perf_counter() - began
        if tokens and tokens[-1] in models["ends"]:  # which engines give back, and which do not
            tokens.pop()
        print(json.dumps({"tokens": tokens, "seconds": seconds}), file=out, flush=True)


if __name__ == "__main__":
    main()
