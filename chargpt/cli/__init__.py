"""The command line: python -m chargpt COMMAND.

main.py     dispatches commands, turns user errors into short messages
parsing.py  the parsing code that the commands share
train.py    fit, validate and test: LightningCLI
predict.py  predict: prompts in, texts out, without Lightning
export.py   export: a self-contained HTML page, a folder for Hugging Face, or an ONNX file
import_nanogpt.py  import: a checkpoint of nanoGPT becomes a run
"""
