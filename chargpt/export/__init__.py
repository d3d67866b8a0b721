"""Conversion to and from other programs.

page.py          one HTML file that runs the network in a browser
huggingface.py   a folder that AutoModelForCausalLM.from_pretrained loads: GPT-2 or GPT-NeoX if
                 equivalent (gpt2_neox.py), otherwise a model with its own code (remote_code/)
onnx.py          one file for ONNX runtimes
from_nanogpt.py  a nanoGPT checkpoint as a checkpoint of this package

An export to Hugging Face or ONNX ends by comparing logits (comparison.py), before it is moved to
its destination.
"""
