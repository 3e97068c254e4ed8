"""Adapters for trainers that people already use: one file each, imported on demand; nothing is patched.

`sparsetwin.integrations.transformers` for the Hugging Face Trainer, `.accelerate`, `.lightning` (and
`.pytorch_lightning`), `.timm`; `.hub` saves and opens pairs as the Hugging Face hub expects them; `.lengths` describes
a schedule before the length of the run is known.
"""
