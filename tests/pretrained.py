"""CAT on a pretrained model of Hugging Face: from JSON Lines files to the share of right answers.
In the folder of cat.py:

    python -m tests.pretrained --model MODEL --train FILE --iid FILE --ood FILE \
        --learning_rate 2e-4 --num_train_epochs 4 --output_dir out/hf

The 10 upper layers are trained and supervised (--upper). With --gamma 0 and another --output_dir,
the same command trains them without CAT. Its folder gets the checkpoints and right.json: for each
question of iid and ood, whether it is answered right. The flags of transformers.TrainingArguments
that are about training can be given too.
"""
import json
import math
import random
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import transformers as hf
from transformers.hf_argparser import HfArg

from cat import FORMS, average_attention, gamma_at, re_attention_loss
from data import (CAUSES, NUMBER, OneLineParser, UserError, choose_causes, read, run_main,
                  token_edges)


# ----------------------------------------------------------------------------
# The loss

class CATTrainer(hf.Trainer):
    """A Trainer whose loss is L = L_next + gamma * L_attn.

    args are a CATConfig, as below, and batches are those of `collate`. The model must return
    attention maps: load it with attn_implementation="eager".
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args = self.args
        adjacency = inputs.pop("adjacency")  # (B, T, T)
        mask = inputs.pop("mask")  # (B, T)
        if not model.training or args.gamma == 0:  # no map is needed
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        inputs["output_attentions"] = True
        loss_next, output = super().compute_loss(model, inputs, True, num_items_in_batch)
        attentions = output.get("attentions") or []  # None, if the model can't return maps
        attn = average_attention(attentions[-args.upper:])  # (B, T, T)
        loss_attn = re_attention_loss(attn, adjacency, args.alpha, args.form, mask)
        if not loss_attn.requires_grad:
            raise UserError("CAT has no effect, since no attention map has a gradient: train "
                            'layers with attention, and checkpoint with {"use_reentrant": false}')
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            # Here loss_next is already a part of a mean over all accumulated batches. In other
            # models the Trainer itself divides the whole loss by their number.
            loss_attn = loss_attn / self.current_gradient_accumulation_steps

        trained = self.state.global_step / self.state.max_steps  # the share of the training done
        loss = loss_next + gamma_at(trained, args.gamma, args.decay) * loss_attn
        return (loss, output) if return_outputs else loss


# ----------------------------------------------------------------------------
# Data: an Example becomes a row of tokens, and rows become a batch

def choose_edges(example, args, rng):
    """The example with those edges that --edges and --causes choose to train with."""
    if args.edges == "answer-numbers":
        text = example.input + example.target
        kept = []
        for effect, cause in example.edges:
            in_answer = effect[1] > len(example.input)
            if in_answer and NUMBER.search(text, *cause):
                kept.append((effect, cause))
        example = replace(example, edges=kept)
    return choose_causes(example, args.causes, rng)


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
    texts = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
    batch = hf.DataCollatorForSeq2Seq(tokenizer)(texts)  # pads labels with -100
    B, T = batch["input_ids"].shape
    batch["mask"] = batch["attention_mask"].clone()
    batch["adjacency"] = torch.zeros(B, T, T, dtype=torch.bool)
    for b, row in enumerate(rows):
        position = batch["attention_mask"][b].nonzero()[:, 0]  # where each token of the row is
        # The first token draws attention whatever it holds, so it is no key, not even as a cause.
        batch["mask"][b, position[0]] = 0
        for query, key in row["edges"]:
            batch["adjacency"][b, position[query], position[key]] = True
    return batch


def right(logits, labels):
    """(B,) bool: each token of the answer is the likeliest after those before it, so the model
    would say it. logits are (B, T, vocab_size), labels (B, T)."""
    said = logits[:, :-1].argmax(dim=-1)  # position t says token t + 1
    expected = labels[:, 1:]
    return ((said == expected) | (expected == -100)).all(dim=1)


# ----------------------------------------------------------------------------
# The program

@dataclass(kw_only=True)
class CATConfig(hf.TrainingArguments):
    model: str = HfArg(help="a folder, or a name on the hub")
    train: str = HfArg(help="a JSON Lines file to train on")
    iid: str = HfArg(help="one to test on, in distribution")
    ood: str = HfArg(help="one to test on, out of distribution")
    causes: Literal[CAUSES] = HfArg(
        default="value", help="the numbers of each cause, whole spans, or a control")
    edges: Literal["all", "answer-numbers"] = HfArg(
        default="all", help="all edges, or those from the answer to causes with a number")
    upper: int = HfArg(default=10, help="upper layers to train and supervise")
    form: Literal[FORMS] = HfArg(default="each", help="form of L_attn")
    alpha: float = HfArg(default=100.0, help="ratio of attention to reach")
    gamma: float = HfArg(default=0.3, help="weight of L_attn at the start")
    decay: float = HfArg(default=0.0, help="the weight ends at gamma * exp(-decay)")

    def __post_init__(self):
        super().__post_init__()
        self.remove_unused_columns = False  # the Trainer would remove the edges
        if self.upper < 1 or not 0 < self.alpha < math.inf:
            raise ValueError(f"--upper {self.upper} --alpha {self.alpha}: give numbers over 0")
        gamma_at(0.0, self.gamma, self.decay)  # says what is wrong with the two


class OneLineHfParser(OneLineParser, hf.HfArgumentParser):
    """The flags of a dataclass, with errors of one line."""


def load(args):
    """The tokenizer, and the model, of which only the upper layers will be trained."""
    try:
        # Maps come back after dropout, which would hide causes at random.
        config = hf.AutoConfig.from_pretrained(args.model, attention_dropout=0.0, attn_pdrop=0.0)
        tokenizer = hf.AutoTokenizer.from_pretrained(args.model, padding_side="right")
        model = hf.AutoModelForCausalLM.from_pretrained(
            args.model, config=config, dtype=torch.float32, attn_implementation="eager")
    except (OSError, ValueError) as error:
        raise UserError(f"--model {args.model}: {str(error).splitlines()[0]}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.requires_grad_(False)
    # The first list of modules in a model is that of its layers.
    layers = next(part for part in model.modules() if isinstance(part, torch.nn.ModuleList))
    layers[-args.upper:].requires_grad_(True)
    return tokenizer, model


def main(argv):
    parser = OneLineHfParser(CATConfig)
    try:
        args, = parser.parse_args_into_dataclasses(argv)
    except ValueError as error:  # what the dataclasses say of the values
        raise UserError(error) from None

    rng = random.Random(args.seed)
    train = [choose_edges(example, args, rng) for example in read(args.train)]
    if args.gamma > 0 and not any(example.edges for example in train):
        raise UserError(f"{args.train}: no example has a cause to look at: label some, or "
                        "choose others with --causes and --edges")
    tests = {"iid": read(args.iid), "ood": read(args.ood)}

    tokenizer, model = load(args)
    trainer = CATTrainer(
        model=model, args=args,
        train_dataset=[encode(example, tokenizer) for example in train],
        data_collator=partial(collate, tokenizer=tokenizer),
        preprocess_logits_for_metrics=right,  # so predictions are (B,) bool, not logits
        processing_class=tokenizer)  # is saved with the model
    trainer.train(args.resume_from_checkpoint)

    marks = {}
    for split, examples in tests.items():
        rows = [encode(example, tokenizer) for example in examples]
        marks[split] = trainer.predict(rows).predictions.tolist()
    if trainer.is_world_process_zero():
        Path(args.output_dir, "right.json").write_text(json.dumps(marks))
        for split in marks:
            print(f"{split}: {sum(marks[split]) / len(marks[split]):.3f} of the answers are right")
    trainer.accelerator.wait_for_everyone()  # a process that ends early could end the others


if __name__ == "__main__":
    run_main(main, on_interrupt="interrupted: --resume_from_checkpoint FOLDER goes on")
