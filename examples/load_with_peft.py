"""Use a trained adapter without us: PEFT puts it on its base.

pip install torch transformers peft
python examples/load_with_peft.py MODEL ADAPTER PROMPT
"""

import sys

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, prompt = sys.argv[1:4]

tokenizer = AutoTokenizer.from_pretrained(adapter)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
inputs = tokenizer(prompt, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(answer[0], skip_special_tokens=True))
