"""CAT on a pretrained model with its own tokenizer: from JSON Lines to the share of right answers,
first without, then with CAT. In the folder of cat.py: `python -m tests.pretrained --help`."""
import torch
import transformers as hf

from cat import average_attention, re_attention_loss
from data import narrow, phrases_to_edges, read, token_edges


class CATTrainer(hf.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        adjacency, seen, cat = inputs.pop("adjacency"), inputs.pop("seen"), self.cat
        if not model.training or not cat.gamma:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs["output_attentions"] = True
        l_next, output = super().compute_loss(model, inputs, True, num_items_in_batch)
        attn = average_attention(output.attentions[-cat.upper:])
        l_attn = re_attention_loss(attn, adjacency, cat.alpha, "each", seen)
        if self.model_accepts_loss_kwargs:  # else the Trainer divides the whole loss itself
            l_attn = l_attn / self.current_gradient_accumulation_steps
        return l_next + cat.gamma * l_attn


def collate(examples, tokenizer):
    """Examples to a batch; labels on the answer and its end, `seen` (B, T), adjacency (B, T, T)."""
    texts = [e.input + e.target + tokenizer.eos_token for e in examples]
    batch = tokenizer(texts, padding=True, return_offsets_mapping=True, return_tensors="pt")
    offsets, prompt = batch.pop("offset_mapping"), torch.tensor([[len(e.input)] for e in examples])
    batch["labels"] = batch["input_ids"].masked_fill(offsets[:, :, 1] <= prompt, -100)
    # token 0 is left out: an attention sink, it draws attention whatever it holds
    batch["seen"] = torch.nn.functional.pad(batch["attention_mask"][:, 1:], (1, 0))
    batch["adjacency"] = torch.zeros(*offsets.shape[:2], offsets.shape[1])
    for b, example in enumerate(examples):
        edges = ((e, part) for e, c in phrases_to_edges(example)[0] for part in narrow(texts[b], c))
        for edge in token_edges(edges, offsets[b].tolist()):
            batch["adjacency"][b, *edge] = 1
    return batch


def right(logits, labels):
    """(B,) bool: each token of the answer is the likeliest after those before it, so greedy too."""
    return ((logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == -100)).all(1)


if __name__ == "__main__":
    parser = hf.HfArgumentParser(hf.TrainingArguments)
    for flag in "model", "gguf_file", "train", "iid", "ood":
        parser.add_argument(f"--{flag}", required=flag != "gguf_file")
    for flag, default in ("upper", 10), ("alpha", 100.0), ("gamma", 0.3):
        parser.add_argument(f"--{flag}", type=type(default), default=default)
    args, cat = parser.parse_args_into_dataclasses()
    train, iid, ood = map(read, (cat.train, cat.iid, cat.ood))
    path = {"pretrained_model_name_or_path": cat.model, "gguf_file": cat.gguf_file}
    tokenizer = hf.AutoTokenizer.from_pretrained(**path, padding_side="right")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    # without dropout, since maps come back after it; sdpa is faster, but returns none
    config = hf.AutoConfig.from_pretrained(**path, attention_dropout=0.0, attn_pdrop=0.0)
    for cat.gamma in 0.0, cat.gamma:
        model = hf.AutoModelForCausalLM.from_pretrained(
            **path, config=config, attn_implementation="eager" if cat.gamma else "sdpa",
            quantization_config=cat.gguf_file and hf.GgufConfig(dequantize=True)).float()
        layers = next(m for m in model.requires_grad_(False).modules()
                      if isinstance(m, torch.nn.ModuleList))
        layers[-cat.upper:].requires_grad_(True)  # those on whose maps the loss is put
        trainer = CATTrainer(model, args, lambda examples: collate(examples, tokenizer), train,
                             {"iid": iid, "ood": ood}, preprocess_logits_for_metrics=right,
                             compute_metrics=lambda out: {"right": out.predictions.mean().item()})
        trainer.cat = cat
        print(f"gamma {cat.gamma}:", trainer.train().metrics | trainer.evaluate(), flush=True)
