"""The way home: a pruned model that is again a model of its class

  fxprune compile ./qwen --params 0.75 --data text.jsonl --target hf --out smaller

`smaller` is the folder that came in, with smaller weights: what reads Hugging Face folders reads it.

  from transformers import AutoModelForCausalLM
  model = AutoModelForCausalLM.from_pretrained("smaller")
  model.generate(**tokens, max_new_tokens=50)              # with its cache

Training, peft and save_pretrained work as on any model of the class. Two layouts:

hf                     one count for all layers, said by numbers of config.json (intermediate_size, heads): the stock
                       class loads it, strictly. Which elements stay differs by layer, how many does not
hf{layout=free}        every layer has widths of its own, as with every other target. config.json states the shapes
                       under `pruned`, and modeling_pruned.py beside it builds transformers' class so:

  model = AutoModelForCausalLM.from_pretrained("smaller", trust_remote_code=True)
  model = fxprune.load_hf("smaller")                       # the same class; no code from the folder runs

free cuts more where the class's config says little: BERT's, GPT-2's and Whisper's heads have no number of their own
(their width is the model's divided by it), so that the default cuts neurons alone there. An error about a budget out
of reach says what each frozen group keeps.

What is in the folder

config.json            as it was, but for the numbers that changed (free: `pruned` and `auto_map` are added)
model.safetensors      in the source's dtype (a bf16 folder comes back bf16, rounded after recovery), tied weights once
everything else        tokenizer, processor, generation config, chat template, modules.json, 1_Pooling: byte for byte.
                       Not copied: weights in other forms, files above 64 MiB, and code (the source's auto_map is
                       dropped: its files are never run here)
model.pt2, plan.json, report.json, report.html   as in every artefact; they may be deleted

What the class can say

is found by trying, before the search; nothing about any class is written down here. For the default each number of the
config is changed, the class is built without weights, and the shapes say what that number moves: groups that it moves
are tied to one count. With free, everything that could be cut is cut once on trial. Either way the class of
transformers then computes with what is left; what it does not take is frozen, with what it says, and the report lists
it. Numbers that a class's code reads beside the shapes (OPT num_heads, GPT-2 split_size) are found in the same way. A
table that all layers share (T5's position bias) ties their heads to each other. Whole branches and tokens stay, and no
bias is added where the class has none.

What is checked

The folder is loaded in a process of its own, with transformers and without fxprune: outputs equal the pruned graph's to
1e-5 (relative) at two batch sizes and lengths, and where the class generates, greedy decoding with its cache gives the
tokens of decoding without. report.json says it under `lowering`. A folder that fails is not written.

Sentence encoders

A folder of sentence-transformers (modules.json: a transformer at its root or in 0_Transformer, 1_Pooling in any of its
modes, then 2_Dense and Normalize) is loaded as the module that people use, from token ids and mask to the embedding,
without that library. The embedding is scored, judged and kept, and the folder that comes home is one as well:

  from sentence_transformers import SentenceTransformer
  SentenceTransformer("smaller").encode(texts)             # free: trust_remote_code=True

modules.json and 1_Pooling are copied; 2_Dense is written with the weights it has then. Where the library is installed,
the fresh process compares what it encodes. A module, pooling mode or activation that is not known is left out together
with the others, the transformer alone is pruned, and a note says so; no class that a folder names is imported.
With --target onnx the file gives sentence_embedding itself, for onnxruntime; sentence-transformers' own ONNX backend
expects one without pooling.

Other ways in

  fxprune plan ./qwen --params 0.75 --data text.jsonl --target hf --out plan.json
  fxprune apply ./qwen-chat --plan plan.json --target hf --out smaller-chat
  fxprune lower small --target hf --against ./qwen --out smaller     # a graph that was made for another target

--target onnx copies the tokenizer, config and other small files of a folder beside model.onnx, whose inputs and outputs
have the names of the class's own (input_ids, attention_mask; logits, last_hidden_state), with batch and length open.

A plan made for another target may cut what the class cannot say; the error then says so.
"""
