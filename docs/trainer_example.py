"""Train a model folder on with transformers' Trainer: python docs/trainer_example.py MODEL TEXT_FILE OUT."""

import sys

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

folder, text, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
lines = load_dataset("text", data_files=text, split="train").filter(lambda row: row["text"].strip())
rows = lines.map(lambda row: tokenizer(row["text"]), remove_columns="text")
options = TrainingArguments(out, max_steps=100, learning_rate=1e-3, report_to="none")
collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
trainer = Trainer(model, options, train_dataset=rows, data_collator=collate)
trainer.train()
trainer.save_model(out)
