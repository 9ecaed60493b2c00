"""CAT on a pretrained model of Hugging Face with its own tokenizer: from JSON Lines files to the
share of right answers, first without, then with CAT. In the folder of cat.py:

    python -m tests.pretrained --model MODEL --train FILE --iid FILE --ood FILE \
        --learning_rate 2e-4 --num_train_epochs 4 --output_dir out/hf

Each run has its own folder, out/hf/no-cat and out/hf/cat, for the checkpoints of the Trainer and
for right.json: 1 for each question of iid and ood that is answered right, 0 for each other.
TrainingArguments gives more flags; those that tests/test_pretrained.py names are tested.
"""
import copy
import json
import math
import random
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import transformers as hf
from transformers.trainer_utils import get_last_checkpoint

from cat import FORMS, average_attention, gamma_at, re_attention_loss
from data import CAUSES, NUMBER, UserError, choose_causes, read, run_main, token_edges


# ----------------------------------------------------------------------------
# The loss

@dataclass
class CATArguments:
    upper: int = field(default=10, metadata={"help": "upper layers to train and supervise"})
    form: str = field(default="each", metadata={"help": "form of L_attn", "choices": FORMS})
    alpha: float = field(default=100.0, metadata={"help": "ratio of attention to reach"})
    gamma: float = field(default=0.3, metadata={"help": "weight of L_attn at the start"})
    decay: float = field(default=0.0, metadata={"help": "the weight ends at gamma * exp(-decay)"})

    def __post_init__(self):
        if self.upper < 1:
            raise ValueError(f"--upper is {self.upper}: give at least 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"--alpha is {self.alpha}: give a number over 0")
        gamma_at(0.0, self.gamma, self.decay)  # says what is wrong with the two


class CATTrainer(hf.Trainer):
    """A Trainer whose loss is L = L_next + gamma * L_attn.

    Its batches hold what the model takes, and adjacency and mask as `re_attention_loss` does.
    The model must return attention maps: load it with attn_implementation="eager".
    """

    def __init__(self, cat, **kwargs):
        super().__init__(**kwargs)
        self.cat = cat  # CATArguments

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        adjacency = inputs.pop("adjacency")  # (B, T, T)
        mask = inputs.pop("mask")  # (B, T) or (B, T, T)
        if not model.training or self.cat.gamma == 0:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        inputs["output_attentions"] = True
        loss_next, output = super().compute_loss(model, inputs, True, num_items_in_batch)
        attentions = output.attentions or []  # None, if the model can't return maps
        attn = average_attention(attentions[-self.cat.upper:])  # (B, T, T)
        loss_attn = re_attention_loss(attn, adjacency, self.cat.alpha, self.cat.form, mask)
        if not loss_attn.requires_grad:
            raise UserError("CAT would have no effect, since no attention map has a gradient: "
                            "train layers with attention, and if you use checkpointing, then "
                            'with {"use_reentrant": false}')
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            # Here loss_next is already a part of a mean over all accumulated batches. In other
            # models the Trainer itself divides the whole loss by their number.
            loss_attn = loss_attn / self.current_gradient_accumulation_steps

        trained = self.state.global_step / self.state.max_steps  # the share of the training done
        gamma = gamma_at(trained, self.cat.gamma, self.cat.decay)
        loss = loss_next + gamma * loss_attn
        return (loss, output) if return_outputs else loss


# ----------------------------------------------------------------------------
# Data: an Example becomes a row of tokens, and rows become a batch

def choose_edges(example, causes, edges, rng):
    """The example with those edges that it is to be trained with (--causes and --edges)."""
    if edges == "answer-numbers":
        text = example.input + example.target
        kept = []
        for effect, cause in example.edges:
            in_answer = effect[1] > len(example.input)
            if in_answer and NUMBER.search(text, *cause):
                kept.append((effect, cause))
        example = replace(example, edges=kept)
    return choose_causes(example, causes, rng)


def encode(example, tokenizer):
    """An Example as a row: its T tokens, as many labels, and its edges as (query, key)."""
    encoded = tokenizer(example.input + example.target, return_offsets_mapping=True)
    tokens = encoded["input_ids"]
    offsets = encoded["offset_mapping"]
    labels = []
    for token, (_, end) in zip(tokens, offsets):
        # Only the answer is learned. Its first token may hold the blank before it too.
        in_answer = end > len(example.input)
        labels.append(token if in_answer else -100)
    tokens.append(tokenizer.eos_token_id)
    labels.append(tokenizer.eos_token_id)
    return {"input_ids": tokens, "labels": labels, "edges": token_edges(example.edges, offsets)}


def collate(rows, tokenizer):
    """A batch of B rows, padded to T tokens on the tokenizer's side: input_ids, attention_mask,
    labels and mask, (B, T) each, and adjacency (B, T, T)."""
    tokens = [{"input_ids": row["input_ids"]} for row in rows]
    batch = dict(tokenizer.pad(tokens, return_tensors="pt"))
    B, T = batch["input_ids"].shape
    batch["labels"] = torch.full((B, T), -100)
    batch["mask"] = batch["attention_mask"].clone()
    batch["adjacency"] = torch.zeros(B, T, T, dtype=torch.bool)
    for b, row in enumerate(rows):
        position = batch["attention_mask"][b].nonzero()[:, 0]  # where each token of the row is
        batch["labels"][b, position] = torch.tensor(row["labels"])
        # The first token draws attention whatever it holds, so it is compared with nothing.
        batch["mask"][b, position[0]] = 0
        query, key = torch.tensor(row["edges"], dtype=torch.long).view(-1, 2).unbind(dim=1)
        batch["adjacency"][b, position[query], position[key]] = True
    return batch


# ----------------------------------------------------------------------------
# Right answers

def right(logits, labels):
    """(B,) bool: each token of the answer is the likeliest after those before it, so the model
    would say it. logits are (B, T, vocab_size), labels (B, T)."""
    said = logits[:, :-1].argmax(dim=-1)  # position t says token t + 1
    expected = labels[:, 1:]
    return ((said == expected) | (expected == -100)).all(dim=1)


@torch.no_grad()
def answer(model, rows, tokenizer, batch_size):
    """1 for each row that the model answers right, 0 for each other, in the order of the rows."""
    model.eval()
    marks = []
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start:start + batch_size], tokenizer)
        input_ids = batch["input_ids"].to(model.device)
        attention_mask = batch["attention_mask"].to(model.device)
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
        marks += right(logits.cpu(), batch["labels"]).int().tolist()
    return marks


# ----------------------------------------------------------------------------
# The program

class OneLineHfParser(hf.HfArgumentParser):
    def error(self, message):
        raise UserError(message)


def parse_args(argv):
    """TrainingArguments, CATArguments and the other flags."""
    parser = OneLineHfParser([hf.TrainingArguments, CATArguments], allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, help="a folder, or a name on the hub")
    add("--gguf_file", help="the GGUF file in it, if it has one")
    add("--train", required=True, help="a JSON Lines file to train on")
    add("--iid", required=True, help="one to test on, in distribution")
    add("--ood", required=True, help="one to test on, out of distribution")
    add("--runs", nargs="+", choices=["no-cat", "cat"], default=["no-cat", "cat"],
        help="without CAT, with CAT, or both")
    add("--causes", choices=CAUSES, default="value", help="what to look at, as in train.py")
    add("--edges", choices=["all", "answer-numbers"], default="all",
        help="all edges, or those from the answer to causes with a number")
    parser.set_defaults(do_train=True)
    try:
        args, cat, flags, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False)
    except ValueError as error:  # what the dataclasses say of the values
        raise UserError(error) from None
    if unknown:
        raise UserError(f"unknown flags: {' '.join(unknown)}")
    if not args.do_train:
        raise UserError("--do_train is false: leave it out, since only what is trained is tested")
    if args.resume_from_checkpoint not in (None, "true"):
        raise UserError(f"--resume_from_checkpoint is {args.resume_from_checkpoint}: give true, "
                        "and each run goes on from the last checkpoint in its own folder")
    args.remove_unused_columns = False  # the Trainer would remove the edges
    return args, cat, flags


def load_tokenizer(flags):
    """The model's configuration and tokenizer."""
    where = {"pretrained_model_name_or_path": flags.model, "gguf_file": flags.gguf_file}
    try:
        # Maps come back after dropout, which would hide causes at random.
        config = hf.AutoConfig.from_pretrained(**where, attention_dropout=0.0, attn_pdrop=0.0)
        tokenizer = hf.AutoTokenizer.from_pretrained(**where, padding_side="right")
    except (OSError, ValueError) as error:
        raise UserError(f"--model {flags.model}: {str(error).splitlines()[0]}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return config, tokenizer


def load_model(flags, config, upper):
    """The model, of which only the upper layers will be trained."""
    quantization = None
    if flags.gguf_file is not None:
        quantization = hf.GgufConfig(dequantize=True)  # quantized weights can't be trained
    model = hf.AutoModelForCausalLM.from_pretrained(
        flags.model, gguf_file=flags.gguf_file, quantization_config=quantization,
        config=config, dtype=torch.float32, attn_implementation="eager")
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList):
            module[-upper:].requires_grad_(True)
            break  # the first list of modules is that of the layers
    return model


def train_and_test(run, args, cat, flags, config, tokenizer, rows):
    """Trains a model without or with CAT; prints, and writes, what it answers right."""
    folder = Path(args.output_dir) / run
    args = copy.copy(args)
    args.output_dir = str(folder)
    if run == "no-cat":
        cat = replace(cat, gamma=0.0)
    model = load_model(flags, config, cat.upper)
    trainer = CATTrainer(
        cat,
        model=model,
        args=args,
        data_collator=partial(collate, tokenizer=tokenizer),
        train_dataset=rows["train"],
        eval_dataset=rows["iid"],  # for --eval_strategy
        processing_class=tokenizer,  # is saved with the model
    )
    checkpoint = None
    if args.resume_from_checkpoint and folder.exists():
        checkpoint = get_last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=checkpoint)

    marks, shares = {}, []
    for split in ("iid", "ood"):
        marks[split] = answer(model, rows[split], tokenizer, args.eval_batch_size)
        shares.append(f"{split} {sum(marks[split]) / len(marks[split]):.3f}")
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "right.json").write_text(json.dumps(marks))
        print(f"{run}: right answers, {', '.join(shares)}", flush=True)


def main(argv):
    args, cat, flags = parse_args(argv)
    examples = {"train": read(flags.train), "iid": read(flags.iid), "ood": read(flags.ood)}
    rng = random.Random(args.seed)
    for i, example in enumerate(examples["train"]):
        examples["train"][i] = choose_edges(example, flags.causes, flags.edges, rng)

    config, tokenizer = load_tokenizer(flags)
    rows = {}
    for split in examples:
        rows[split] = [encode(example, tokenizer) for example in examples[split]]
    if "cat" in flags.runs and not any(row["edges"] for row in rows["train"]):
        raise UserError(f"{flags.train}: no example has a cause to look at: label some, or "
                        "choose others with --causes and --edges")
    for run in flags.runs:
        train_and_test(run, args, cat, flags, config, tokenizer, rows)


if __name__ == "__main__":
    run_main(main, on_interrupt="interrupted: --resume_from_checkpoint true goes on")
