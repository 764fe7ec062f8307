"""The way home: a pruned model that is again a model of its class

  fxprune compile ./qwen --params 0.75 --data text.jsonl --target hf --out smaller

`smaller` is the folder that came in, with smaller weights: what reads Hugging Face folders reads it.

  import fxprune
  model = fxprune.load_hf("smaller")                       # transformers' own class; no code from the folder runs
  model.generate(**tokens, max_new_tokens=50)              # with its cache

  from transformers import AutoModelForCausalLM
  model = AutoModelForCausalLM.from_pretrained("smaller", trust_remote_code=True)

Training, peft and save_pretrained work as on any model of the class.

What is in it

config.json            as it was; `pruned` states the shapes that differ, `auto_map` names the file below
modeling_pruned.py     builds transformers' class with these shapes; torch and transformers are all it needs
model.safetensors      in the source's dtype (a bf16 folder comes back bf16, rounded after recovery), tied weights once
everything else        tokenizer, processor, generation config, chat template, modules.json, 1_Pooling: byte for byte.
                       Not copied: weights in other forms, files above 64 MiB, and code (the source's auto_map is
                       dropped: its files are never run here)
model.pt2, plan.json, report.json, report.html   as in every artefact; they may be deleted

Every layer has widths of its own, as with every target. The code of most classes takes what it needs from the weights'
shapes; some read a number besides (OPT num_heads, GPT-2 split_size, Phi-3 num_attention_heads of the config). Which, is
found by trying: nothing about any class is written down here.

What the class cannot say

Before the search everything that could be cut is cut once on trial, and the class of transformers computes with what is
left. What it does not take is frozen, with what it says; the report lists it. A table that all layers share (T5's
position bias) ties their heads to each other. Tokens are not reduced for this target, and no bias is added where the
class has none.

What is checked

The folder is loaded in a process of its own, with transformers and without fxprune: outputs equal the pruned graph's to
1e-5 (relative) at two batch sizes and lengths, and where the class generates, greedy decoding with its cache gives the
tokens of decoding without. report.json says it under `lowering`. A folder that fails is not written.

Other ways in

  fxprune plan ./qwen --params 0.75 --data text.jsonl --target hf --out plan.json
  fxprune apply ./qwen-chat --plan plan.json --target hf --out smaller-chat
  fxprune lower small --target hf --against ./qwen --out smaller     # a graph that was made for another target

A plan made for another target may cut what the class cannot say; the error then names it.
"""
