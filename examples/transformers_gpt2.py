"""Train a dense GPT-2 and its sparse twin on the bytes of a text, with the Hugging Face Trainer."""

import argparse
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import sparsetwin as st
from sparsetwin.integrations.lengths import PhaseLengths
from sparsetwin.integrations.transformers import SparsifierCallback

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--text", type=Path, required=True, help="any text file, such as Tiny Shakespeare")
parser.add_argument("--out", type=Path, default=Path("runs/gpt2"))
parser.add_argument("--steps", type=int, default=2000)
parser.add_argument("--width", type=int, default=128)
parser.add_argument("--resume", action="store_true")
options = parser.parse_args()

tokens = torch.tensor(list(options.text.read_bytes()))
blocks = [{"input_ids": block, "labels": block} for block in tokens[: len(tokens) // 64 * 64].view(-1, 64)]
train, held_out = blocks[: len(blocks) * 9 // 10], blocks[-64:]

torch.manual_seed(0)
config = GPT2Config(
    vocab_size=256, n_embd=options.width, n_layer=4, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
)
model = GPT2LMHeadModel(config)

lengths = PhaseLengths(
    sparsity=0.8, unit="fractions", warmup=0.1, sparse=0.1, dense=0.1, final_dense=0.1, final_sparse=0.2
)
uniform = partial(st.ACDC, distribution=st.Uniform())  # GPT-2's layers begin with weights of different sizes
callback = SparsifierCallback(lengths, method=uniform)

arguments = TrainingArguments(
    output_dir=str(options.out),
    max_steps=options.steps,
    per_device_train_batch_size=16,
    learning_rate=1e-3,
    lr_scheduler_type="cosine",
    max_grad_norm=1.0,
    eval_strategy="steps",
    eval_steps=0.1,
    save_strategy="steps",
    save_steps=0.1,
    save_total_limit=2,
    report_to=[],
)
trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=held_out, callbacks=[callback])
trainer.train(resume_from_checkpoint=options.resume)

for name, member in callback.pair.members.items():
    print(f"{name}: {member.kept:,} of {member.targets:,} weights kept, {member.metrics}")
sparse = AutoModelForCausalLM.from_pretrained(options.out / "pair" / "sparse")
print(f"{sum(int(weight.count_nonzero()) for weight in sparse.parameters()):,} weights of the sparse half are not zero")
