"""Segment Policy Optimization: makes the embedded task, from one seed: data, tokenizer and warm-started model.

    python tiny/make.py            # writes tiny/{train,test}.jsonl and tiny/model/, then the report; 20 minutes on one core
    python tiny/make.py --report   # only the report on the files that are there; half a minute
    python tiny/make.py --out runs/longer --steps 5 7               # other data of the same form, here longer problems; seconds
    python tiny/make.py --out runs/sums --steps 1 1 --largest 9     # small numbers, one gain or loss
    python tiny/make.py --out runs/long --steps 12 16 --hasty 0.2 --model    # with a start model of their own

The task is arithmetic word problems in GSM8K's own form: a worked solution, then `#### N`. What there is to reinforce is not
arithmetic but a *way of working*. Every step of a demonstration was written by one of two solvers, chosen by a biased coin:

    careful   First 34+20=54, then 54+7=61.      splits the step into two easy ones; always right in the demonstrations
    hasty     So 34+27=61.                       jumps to the result; wrong in SLIP of the demonstrations

A model trained on such demonstrations imitates the mixture. Its answer is a chain of choices, and one hasty choice can spoil
it: so the place of a mistake matters, which is what credit for segments is about, and accuracy, response length and the share
of careful steps rise together during training.
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
LARGEST = 99  # total
HASTY, SLIP = 0.7, 0.5  # share of hasty steps in the demonstrations, share of hasty steps that are wrong
TRAIN_STEPS, BATCH_SIZE, LEARNING_RATE = 3000, 32, 2e-3
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
    """One event that keeps the total within two digits: (its sentence, its numbers, the total after it)."""
    while True:
        kind = rng.choices(["gain", "loss", "boxes", "double", "halve"], weights=[4, 4, 2, 1, 1])[0]
        b, k, m = 10 * rng.randint(1, 5) + rng.randint(1, 9), rng.randint(2, 5), rng.randint(3, 12)
        if kind == "gain" and total + b < 100:
            return rng.choice(GAIN), {"b": b}, total + b
        if kind == "loss" and total - b >= 10:
            return rng.choice(LOSS), {"b": b}, total - b
        if kind == "boxes" and total + k * m < 100:
            return rng.choice(BOXES), {"k": k, "m": m}, total + k * m
        if kind == "double" and total < 50:
            return rng.choice(DOUBLE), {}, 2 * total
        if kind == "halve" and total % 2 == 0 and total >= 20:
            return rng.choice(HALVE), {}, total // 2


def draw_small_event(total: int, largest: int, rng: random.Random) -> tuple[str, dict[str, int], int]:
    """The same with gains and losses only, which keep the total within 1 and `largest`."""
    while True:
        b, gain = rng.randint(2, (largest + 1) // 2), rng.random() < 0.5
        result = total + b if gain else total - b
        if 1 <= result <= largest:
            return rng.choice(GAIN if gain else LOSS), {"b": b}, result


def solve_step(total: int, sentence: str, numbers: dict[str, int]) -> tuple[str, str, int]:
    """The careful line, the hasty line up to its "=", and the right result, for a solver who has reached `total`."""
    tens = total - total % 10
    if sentence in DOUBLE:
        hasty, result = f"2*{total}", 2 * total
        first, second = f"{total}+{tens}={total + tens}", f"{total + tens}+{total % 10}"
    elif sentence in HALVE:
        hasty, result = f"{total}/2", total // 2
        first, second = f"{tens}/2={tens // 2}", f"{tens // 2}+{total % 10 // 2}"
    elif sentence in BOXES:
        k, m = numbers["k"], numbers["m"]
        hasty, result = f"{total}+{k}*{m}", total + k * m
        first, second = f"{k}*{m}={k * m}", f"{total}+{k * m}"
    else:
        sign, b = (1, numbers["b"]) if sentence in GAIN else (-1, numbers["b"])
        mark, tens = "+-"[sign < 0], b - b % 10
        hasty, result = f"{total}{mark}{b}", total + sign * b
        first, second = f"{total}{mark}{tens}={total + sign * tens}", f"{total + sign * tens}{mark}{b % 10}"
    return f"First {first}, then {second}={result}.", f"So {hasty}=", result


def make_problem(rng: random.Random, hasty: float, num_steps: tuple[int, int], largest: int) -> tuple[str, str]:
    """A question and a solution of one line per event; each line is hasty with probability `hasty`. A slip is carried on."""
    while True:
        name, friend = rng.sample(NAMES, 2)
        things, events = rng.choice(THINGS), []
        start = total = rng.randint(11, 89) if largest == LARGEST else rng.randint(2, largest - 1)
        for _ in range(rng.randint(*num_steps)):
            sentence, numbers, total = draw_event(total, rng) if largest == LARGEST else draw_small_event(total, largest, rng)
            events.append((sentence, numbers))
        total, lines = start, []
        for sentence, numbers in events:
            careful_line, hasty_line, result = solve_step(total, sentence, numbers)
            if sentence in HALVE and total % 2 or result < 0:
                break  # an earlier slip made this event impossible: draw another problem
            if rng.random() < hasty:  # a slip is a forgotten carry or a miscount
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


def draw_problems(rng: random.Random, num_steps: tuple[int, int], largest: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Distinct train and test problems with careful, right solutions."""
    problems = {}
    while len(problems) < NUM_TRAIN + NUM_TEST:
        question, answer = make_problem(rng, 0.0, num_steps, largest)
        problems[question] = answer
    problems = list(problems.items())
    return problems[NUM_TEST:], problems[:NUM_TEST]


def warm_start(
    tokenizer, forbidden: set[str], rng: random.Random, hasty: float, num_steps: tuple[int, int], largest: int
) -> LlamaForCausalLM:
    """Supervised learning on fresh demonstrations, none of whose questions is in `forbidden`; loss on the solution only."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=1,  # one key and value head: sampling on a CPU is bound by reading the cache
        head_dim=32, max_position_embeddings=64 * (num_steps[1] + 3), tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, TRAIN_STEPS, pct_start=0.05)
    start = time.time()
    for step in range(1, TRAIN_STEPS + 1):
        texts = []
        while len(texts) < BATCH_SIZE:
            question, answer = make_problem(rng, hasty, num_steps, largest)
            if question not in forbidden:
                texts.append((question, answer))
        prompts = tokenizer([question + "\n" for question, _ in texts], add_special_tokens=False).input_ids
        answers = tokenizer([answer for _, answer in texts], add_special_tokens=False).input_ids
        length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers)) + 2
        input_ids = torch.zeros(BATCH_SIZE, length, dtype=torch.long)
        labels = torch.full((BATCH_SIZE, length), -100)  # -100: no loss
        for row, (prompt, answer) in enumerate(zip(prompts, answers)):
            tokens = torch.tensor([tokenizer.bos_token_id, *prompt, *answer, tokenizer.eos_token_id])
            input_ids[row, : len(tokens)] = tokens
            labels[row, len(prompt) + 1 : len(tokens)] = tokens[len(prompt) + 1 :]
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}/{TRAIN_STEPS}  loss {loss.item():.3f}  {time.time() - start:.0f} s", flush=True)
    return model.eval()


def kind_of_answer(reference: str, response: str, finished: bool) -> str:
    """What became of one answer, judged line by line against the worked reference solution."""
    if not finished:
        return "cut by the length limit"
    lines, expected = response.split("\n"), reference.split("\n")
    if not re.fullmatch(r"#### \d+", lines[-1]) or not all(re.fullmatch(r"(First|So) .*=\d+\.", line) for line in lines[:-1]):
        return "wrong format"
    if lines[-1] == expected[-1]:
        return "right"
    totals = [int(line.rstrip(".").rpartition("=")[2]) for line in expected[:-1]]
    for line, total in zip(lines[:-1], totals):
        for a, sign, b, c, result in re.findall(r"(\d+)([-+*/])(\d+)(?:\*(\d+))?=(\d+)", line):
            a, b, result = int(a), int(b) * int(c or 1), int(result)
            if not {"+": a + b == result, "-": a - b == result, "*": a * b == result, "/": b != 0 and a // max(b, 1) == result}[sign]:
                return "wrong step: wrong calculation"
        if int(line.rstrip(".").rpartition("=")[2]) != total:
            return "wrong step: wrong operation or operand"
    return "stopped early or added a step" if len(lines) != len(expected) else "wrong final line"


def report(directory: Path, max_new_tokens: int) -> None:
    """Greedy and sampled accuracy on the test problems, share of careful steps, and the kinds of 200 wrong answers."""
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory / "model", padding_side="left")
    rows = [json.loads(line) for line in (directory / "test.jsonl").open()]
    prompts = [f"{tokenizer.bos_token}{row['question']}\n" for row in rows]
    batch = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
    torch.manual_seed(SEED)
    for name, options in [("greedy", {"do_sample": False}), ("sampled", {"do_sample": True, "top_k": 0, "temperature": 1.0})]:
        output = model.generate(**batch, **options, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id)
        output = output[:, batch.input_ids.shape[1] :]
        finished = (output == tokenizer.eos_token_id).any(1).tolist()
        responses = tokenizer.batch_decode(output, skip_special_tokens=True)
        kinds = [kind_of_answer(row["answer"], response, end) for row, response, end in zip(rows, responses, finished)]
        steps = [line for response in responses for line in response.split("\n")[:-1]]
        careful = sum(step.startswith("First") for step in steps) / len(steps)
        lengths = (output != tokenizer.pad_token_id).sum(1).float()
        print(f"{name}: accuracy {kinds.count('right') / len(kinds):.3f}, careful steps {careful:.3f}, "
              f"tokens per answer {lengths.mean():.1f} (longest {lengths.max():.0f})")
    wrong = [kind for kind in kinds if kind != "right"][:200]
    print(f"{len(wrong)} wrong answers:", ", ".join(f"{kind} {count / len(wrong):.3f}" for kind, count in Counter(wrong).most_common()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only report on the files that are there")
    parser.add_argument("--out", type=Path, default=HERE, help="directory of the data, and of the model with --model")
    parser.add_argument("--steps", type=int, nargs=2, default=NUM_STEPS, help="least and most events of a problem, with --out")
    parser.add_argument("--largest", type=int, default=LARGEST, help="largest total, with --out; less: gains and losses only")
    parser.add_argument("--hasty", type=float, default=HASTY, help="share of hasty steps that the model imitates, with --out")
    parser.add_argument("--model", action="store_true", help="a start model as well, with --out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, rng, task = time.time(), random.Random(SEED), (args.steps, args.largest)
    if not args.report:
        train, test = draw_problems(rng, *task)
        args.out.mkdir(parents=True, exist_ok=True)
        for name, problems in [("train", train), ("test", test)]:
            lines = [json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in problems]
            (args.out / f"{name}.jsonl").write_text("".join(lines))
    with_model = args.model or args.out == HERE
    if with_model and not args.report:
        tokenizer = make_tokenizer(["\n".join(make_problem(rng, args.hasty, *task)) for _ in range(5000)])
        model = warm_start(tokenizer, {question for question, _ in train + test}, rng, args.hasty, *task)
        model.save_pretrained(args.out / "model")
        tokenizer.save_pretrained(args.out / "model")
        print(f"made in {(time.time() - start) / 60:.1f} minutes")
    if with_model or args.report:
        report(args.out, 32 * args.steps[1])
