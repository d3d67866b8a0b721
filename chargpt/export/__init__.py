"""Export: a trained network leaves for other programs.

page.py         one HTML file in which the network writes, in any browser
huggingface.py  a folder that AutoModelForCausalLM.from_pretrained loads
"""
