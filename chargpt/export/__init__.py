"""Conversion to and from other programs.

page.py          one HTML file that runs the network in a browser
huggingface.py   a folder that AutoModelForCausalLM.from_pretrained loads
from_nanogpt.py  a nanoGPT checkpoint as a checkpoint of this package
"""
