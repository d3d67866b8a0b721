"""The command line: python -m chargpt COMMAND.

main.py     which command, and errors in plain words
parsing.py  what all commands share of parsing
train.py    fit, validate and test: LightningCLI
predict.py  predict: prompts in, texts out, without Lightning
export.py   export: a page that writes, a folder for Hugging Face
import_nanogpt.py  import: a checkpoint of nanoGPT becomes a run
"""
