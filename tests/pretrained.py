"""CAT on a pretrained model with its own tokenizer: JSON Lines in; out comes the share of right
answers, in distribution and out, without and with CAT. Run from the folder of cat.py:
`python -m tests.pretrained --help`. The flags are those below and all of TrainingArguments."""
from dataclasses import dataclass
from functools import partial

import torch
import transformers as hf

from cat import average_attention, gamma_at, re_attention_loss, supervised_queries
from data import narrow_edges, phrases_to_edges, read, token_edges


@dataclass(kw_only=True)
class CATArguments(hf.TrainingArguments):
    model: str  # a folder or a name on the hub
    gguf_file: str | None = None  # in that folder
    train: str
    iid: str
    ood: str
    upper: int = 10  # layers to train and to supervise, on the mean of their maps; 0 for all
    alpha: float = 100.0
    gamma: float = 0.3
    decay: float = 0.1


class CATTrainer(hf.Trainer):
    """Every supervised query weighs the same, however micro-batches and processes split them. A
    batch holds, besides the model's inputs, `adjacency` and `seen`, the loss's mask."""
    def get_batch_samples(self, *args):
        batches, num_items = super().get_batch_samples(*args)
        count = sum(len(supervised_queries(b["adjacency"], b["seen"])[0]) for b in batches)
        self.count = self.accelerator.reduce(torch.tensor(count, device=self.args.device), "sum")
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        adjacency, seen, args = inputs.pop("adjacency"), inputs.pop("seen"), self.args
        if not model.training or not args.gamma:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs["output_attentions"] = True
        loss, output = super().compute_loss(model, inputs, True, num_items_in_batch)
        attn = average_attention(output.attentions[-args.upper:])
        penalty = re_attention_loss(attn, adjacency, args.alpha, "log", seen, "none")
        scale = self.accelerator.num_processes  # gradients are averaged over processes
        if not self.model_accepts_loss_kwargs:  # and this Trainer then over micro-batches too
            scale *= self.current_gradient_accumulation_steps
        gamma = gamma_at(self.state.epoch, args.gamma, args.decay)
        return loss + gamma * scale * penalty.sum() / self.count.clamp(min=1)


def collate(examples, tokenizer):
    """Examples to a batch, (B, T) each; labels on the answer and its end; adjacency (B, T, T)."""
    texts = [e.input + e.target + tokenizer.eos_token for e in examples]
    batch = tokenizer(texts, padding=True, return_offsets_mapping=True, return_tensors="pt")
    offsets, prompt = batch.pop("offset_mapping"), torch.tensor([[len(e.input)] for e in examples])
    batch["labels"] = batch["input_ids"].masked_fill(offsets[:, :, 1] <= prompt, -100)
    # token 0 is left out: an attention sink, it draws attention whatever it holds
    batch["seen"] = batch["attention_mask"] * (batch["attention_mask"].cumsum(1) > 1)
    batch["adjacency"] = torch.zeros(*offsets.shape[:2], offsets.shape[1])
    for b, example in enumerate(examples):
        edges = narrow_edges(texts[b], phrases_to_edges(example)[0], (), "value", None)
        for query, key in token_edges(edges, offsets[b].tolist()):
            batch["adjacency"][b, query, key] = 1
    return batch


def right(output):
    """The share of right greedy answers: each token the likeliest after the ones before it."""
    tokens, labels = output.predictions[:, :-1], output.label_ids[:, 1:]
    return {"acc": ((tokens == labels) | (labels == -100)).all(1).mean().item()}


def main():
    parser = hf.HfArgumentParser(CATArguments)
    args, = parser.parse_args_into_dataclasses()
    try:
        train, iid, ood = (read(file)[0] for file in (args.train, args.iid, args.ood))
    except (ValueError, OSError) as error:
        parser.exit(2, f"pretrained.py: {error}\n")
    path = {"pretrained_model_name_or_path": args.model, "gguf_file": args.gguf_file}
    tokenizer = hf.AutoTokenizer.from_pretrained(**path, padding_side="right")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    # maps come back after dropout, so there is none; sdpa and flash attention return no maps
    config = hf.AutoConfig.from_pretrained(**path, attention_dropout=0.0, attn_pdrop=0.0)
    folder = args.output_dir
    for run, args.gamma in ("without", 0), ("with", args.gamma):
        args.output_dir = f"{folder}/{run}"
        model = hf.AutoModelForCausalLM.from_pretrained(
            **path, config=config, attn_implementation="eager", dtype=torch.float32,
            quantization_config=args.gguf_file and hf.GgufConfig(dequantize=True))
        model.requires_grad_(False)
        layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
        layers[-args.upper:].requires_grad_(True)
        trainer = CATTrainer(
            model, args, partial(collate, tokenizer=tokenizer), train, {"iid": iid, "ood": ood},
            tokenizer, compute_metrics=right,
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1))
        trainer.train()
        share = trainer.evaluate()
        if trainer.is_world_process_zero():
            print(f"{run} CAT: {share['eval_iid_acc']:.3f} IID, {share['eval_ood_acc']:.3f} OOD")


if __name__ == "__main__":
    main()
