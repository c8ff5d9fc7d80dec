"""Makes the embedded default task for Segment Policy Optimization: data, tokenizer and a warm-started model, from one seed.

    python tiny/make.py            # writes tiny/{train,test}.jsonl and tiny/model/, then prints the report
    python tiny/make.py --report   # only the report on what is there: accuracy, careful steps, kinds of wrong answers

The task is arithmetic word problems in GSM8K's own form (a worked solution, then `#### N`). What there is to reinforce is not
arithmetic but a *way of working*. Every step of a demonstration was written by one of two kinds of solver, chosen by a coin:

    careful   First 34+20=54, then 54+7=61.      splits the step in two easy ones; always right in the demonstrations
    hasty     So 34+27=61.                       jumps to the result; wrong in SLIP of the demonstrations

A model trained on such demonstrations imitates the mixture: each answer is a chain of choices, and one hasty choice can spoil
it. So the place of the mistake matters, which is what segment-level credit is about, and accuracy, response length and the
share of careful steps should rise together during training.
"""

import argparse
import json
import random
import re
import time
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 1
NUM_TRAIN, NUM_TEST = 4000, 500
NUM_STEPS = (3, 5)  # events per problem, both ends included
HASTY, SLIP = 0.6, 0.4  # share of hasty steps in the demonstrations, share of hasty steps that are wrong
TRAIN_STEPS, BATCH_SIZE, LEARNING_RATE = 1500, 96, 2e-3
HIDDEN, INTER, LAYERS = 128, 352, 3
HERE = Path(__file__).parent

NAMES = "Ana Ben Carla David Emma Finn Grace Hugo Ivy Jack Kira Leo Mia Noah Olga Paul Rosa Sam Tara Victor".split()
THINGS = "apples beads books buttons cards coins marbles pens shells stamps stickers stones".split()
PLACES = "fair park school beach market library".split()
GAIN = [
    "{name} buys {b} {things} at the {place}.",
    "{name} finds {b} more {things} near the {place}.",
    "{friend} gives {name} {b} {things}.",
    "Then {name} wins {b} {things} in a game with {friend}.",
]
LOSS = [
    "{name} gives {b} {things} to {friend}.",
    "{name} loses {b} of the {things} on the way to the {place}.",
    "Then {name} sells {b} {things} at the {place}.",
    "{friend} borrows {b} {things} from {name}.",
]
DOUBLE = ["{name} then doubles the number of {things}.", "At the {place} {name} gets as many {things} again."]
HALVE = ["{name} leaves half of the {things} at the {place}.", "{name} then shares the {things} equally with {friend}."]
BOXES = ["{name} buys {k} boxes of {m} {things} each.", "{friend} brings {name} {k} bags with {m} {things} in each."]


def draw_event(total: int, rng: random.Random) -> tuple[str, dict[str, int], int]:
    """One event that keeps the total within two to three digits: (its sentence, its numbers, the total after it)."""
    while True:
        kind = rng.choices(["gain", "loss", "boxes", "double", "halve"], weights=[4, 4, 2, 1, 1])[0]
        b, k, m = 10 * rng.randint(1, 5) + rng.randint(1, 9), rng.randint(2, 5), rng.randint(3, 12)
        if kind == "gain" and total + b < 200:
            return rng.choice(GAIN), {"b": b}, total + b
        if kind == "loss" and total - b >= 10:
            return rng.choice(LOSS), {"b": b}, total - b
        if kind == "boxes" and total + k * m < 200:
            return rng.choice(BOXES), {"k": k, "m": m}, total + k * m
        if kind == "double" and total < 100:
            return rng.choice(DOUBLE), {}, 2 * total
        if kind == "halve" and total % 2 == 0 and total >= 20:
            return rng.choice(HALVE), {}, total // 2


def solve_step(total: int, sentence: str, numbers: dict[str, int]) -> tuple[str, str, int]:
    """The careful line, the hasty line up to its "=", and the right result, for a solver who has reached `total`."""
    tens = total - total % 10
    if sentence in DOUBLE:
        first, second, hasty, result = f"{total}+{tens}={total + tens}", f"{total + tens}+{total % 10}", f"2*{total}", 2 * total
    elif sentence in HALVE:
        first, second, hasty, result = f"{tens}/2={tens // 2}", f"{tens // 2}+{total % 10 // 2}", f"{total}/2", total // 2
    elif sentence in BOXES:
        k, m = numbers["k"], numbers["m"]
        first, second, hasty, result = f"{k}*{m}={k * m}", f"{total}+{k * m}", f"{total}+{k}*{m}", total + k * m
    else:
        sign, b = (1, numbers["b"]) if sentence in GAIN else (-1, numbers["b"])
        mark, tens, result = "+-"[sign < 0], b - b % 10, total + sign * b
        first, second, hasty = f"{total}{mark}{tens}={total + sign * tens}", f"{total + sign * tens}{mark}{b % 10}", f"{total}{mark}{b}"
    return f"First {first}, then {second}={result}.", f"So {hasty}=", result


def make_problem(rng: random.Random, hasty: float) -> tuple[str, str]:
    """A question and a solution of one line per event; each line is hasty with probability `hasty`. A slip is carried on."""
    while True:
        name, friend = rng.sample(NAMES, 2)
        things, events = rng.choice(THINGS), []
        start = total = rng.randint(11, 99)
        for _ in range(rng.randint(*NUM_STEPS)):
            sentence, numbers, total = draw_event(total, rng)
            events.append((sentence, numbers))
        total, lines = start, []
        for sentence, numbers in events:
            careful_line, hasty_line, result = solve_step(total, sentence, numbers)
            if sentence in HALVE and total % 2 or result < 0:
                break  # an earlier slip made this event impossible: draw another problem
            if rng.random() < hasty:
                # a forgotten carry, or a miscount
                total = max(result + rng.choice([-10, -1, 1, 10]), 0) if rng.random() < SLIP else result
                lines.append(f"{hasty_line}{total}.")
            else:
                total = result
                lines.append(careful_line)
        else:
            sentences = [f"{name} has {start} {things}."] + [
                sentence.format(name=name, friend=friend, things=things, place=rng.choice(PLACES), **numbers)
                for sentence, numbers in events
            ]
            question = f"{' '.join(sentences)} How many {things} does {name} have now?"
            return question, "\n".join([*lines, f"#### {total}"])


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE on words with their trailing space; every digit is a token. `<s>` starts a text, `</s>` ends it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\d|[A-Za-z]+ ?|[^A-Za-z\d\s]+\s?|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   clean_up_tokenization_spaces=False)


def warm_start(tokenizer, forbidden: set[str], rng: random.Random):
    """Supervised learning on fresh demonstrations, none of whose questions is in `forbidden`; loss on the solution only."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=INTER, num_hidden_layers=LAYERS, num_attention_heads=HIDDEN // 32,
        head_dim=32, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, TRAIN_STEPS, pct_start=0.05)
    start = time.time()
    for step in range(1, TRAIN_STEPS + 1):
        texts = []
        while len(texts) < BATCH_SIZE:
            question, answer = make_problem(rng, HASTY)
            if question not in forbidden:
                texts.append((question, answer))
        prompts = [[tokenizer.bos_token_id, *ids] for ids in tokenizer([q + "\n" for q, _ in texts], add_special_tokens=False).input_ids]
        answers = [[*ids, tokenizer.eos_token_id] for ids in tokenizer([a for _, a in texts], add_special_tokens=False).input_ids]
        length = max(len(p) + len(a) for p, a in zip(prompts, answers))
        ids = torch.tensor([p + a + [0] * (length - len(p) - len(a)) for p, a in zip(prompts, answers)])
        labels = torch.tensor([[-100] * len(p) + a + [-100] * (length - len(p) - len(a)) for p, a in zip(prompts, answers)])
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}/{TRAIN_STEPS}  loss {loss.item():.3f}  {time.time() - start:.0f} s", flush=True)
    return model.eval()


def kind_of_answer(reference: str, response: str, finished: bool) -> str:
    """What became of one answer, judged against the worked reference solution line by line.

    One of: right, wrong calculation, wrong operation or operand, step missing or added, wrong format, stopped early.
    """
    if not finished:
        return "stopped early"
    lines, expected = response.split("\n"), reference.split("\n")
    if not re.fullmatch(r"#### \d+", lines[-1]) or not all(re.fullmatch(r"(First|So) .*=\d+\.", line) for line in lines[:-1]):
        return "wrong format"
    if lines[-1] == expected[-1]:
        return "right"
    totals = [int(line.rstrip(".").split("=")[-1]) for line in expected[:-1]]
    for line, total in zip(lines[:-1], totals):
        for a, op, b, c, d in re.findall(r"(\d+)([-+*/])(\d+)(?:\*(\d+))?=(\d+)", line):
            a, b, c, d = int(a), int(b), int(c or 1), int(d)
            if {"+": a + b * c, "-": a - b * c, "*": a * b * c, "/": a // (b * c)}[op] != d:
                return "wrong calculation"
        if int(line.rstrip(".").split("=")[-1]) != total:
            return "wrong operation or operand"
    return "step missing or added" if len(lines) != len(expected) else "wrong final line"


def report(directory: Path) -> None:
    """Sampled and greedy accuracy on the test problems, share of careful steps, and the kinds of 200 wrong answers."""
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory / "model", padding_side="left")
    rows = [json.loads(line) for line in (directory / "test.jsonl").open()]
    batch = tokenizer(["<s>" + row["question"] + "\n" for row in rows], add_special_tokens=False, padding=True, return_tensors="pt")
    torch.manual_seed(SEED)
    for name, options in [("greedy", {"do_sample": False}), ("sampled", {"do_sample": True, "top_k": 0, "temperature": 1.0})]:
        output = model.generate(**batch, **options, max_new_tokens=160, pad_token_id=tokenizer.pad_token_id)[:, batch.input_ids.shape[1]:]
        finished = (output == tokenizer.eos_token_id).any(1).tolist()
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        kinds = [kind_of_answer(row["answer"], text, done) for row, text, done in zip(rows, texts, finished)]
        steps = [line for text in texts for line in text.split("\n")[:-1]]
        length = (output != tokenizer.pad_token_id).sum(1).float()
        print(f"{name}: accuracy {kinds.count('right') / len(kinds):.3f}, careful steps {sum(s.startswith('First') for s in steps) / len(steps):.3f}, "
              f"tokens per answer {length.mean():.1f} (longest {length.max():.0f}), prompt {batch.attention_mask.sum(1).float().mean():.1f}")
    for style in ("First", "So"):
        pass
    wrong = [kind for kind in kinds if kind != "right"][:200]
    print(f"{len(wrong)} wrong answers:", ", ".join(f"{kind} {count / len(wrong):.2f}" for kind, count in Counter(wrong).most_common()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only report on the files that are there")
    parser.add_argument("--out", type=Path, default=HERE)
    for n in ("hasty", "slip", "lr"): parser.add_argument("--"+n, type=float)
    for n in ("steps", "hidden", "inter","layers","lo","hi","batch"): parser.add_argument("--"+n, type=int)
    args = parser.parse_args()
    if args.hasty is not None: HASTY=args.hasty
    if args.slip is not None: SLIP=args.slip
    if args.lr: LEARNING_RATE=args.lr
    if args.steps: TRAIN_STEPS=args.steps
    if args.batch: BATCH_SIZE=args.batch
    if args.hidden: HIDDEN=args.hidden; INTER=args.inter; LAYERS=args.layers
    if args.lo: NUM_STEPS=(args.lo,args.hi)
    torch.set_num_threads(1)
    if not args.report:
        start = time.time()
        rng = random.Random(SEED)
        problems = {}
        while len(problems) < NUM_TRAIN + NUM_TEST:
            question, answer = make_problem(rng, hasty=0.0)
            problems[question] = answer
        rows = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in problems.items()]
        args.out.mkdir(exist_ok=True)
        (args.out / "test.jsonl").write_text("".join(rows[:NUM_TEST]))
        (args.out / "train.jsonl").write_text("".join(rows[NUM_TEST:]))
        tokenizer = make_tokenizer([f"{q}\n{a}" for q, a in (make_problem(rng, HASTY) for _ in range(5000))])
        model = warm_start(tokenizer, set(problems), rng)
        model.save_pretrained(args.out / "model")
        tokenizer.save_pretrained(args.out / "model")
        print(f"made in {(time.time() - start) / 60:.1f} minutes")
    report(args.out)
