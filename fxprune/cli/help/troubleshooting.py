"""Troubleshooting

What people meet when they prune, in the order of how often they complain about it anywhere, and what to do here.

1. MACs are halved, latency is not.
   MACs are not time: small batches wait for launches and memory, and narrow layers use a device badly. The report says
   what became real ("Measured latency"); `fxprune bench small --against MODEL --batch 1,32 --record` adds batch sizes,
   on the machine that counts. Make time the budget (--latency 0.6, measured on this machine), or ask first what a
   budget of MACs would bring (--expect-latency); keep widths at multiples of what the device likes (--align auto); or
   cut tokens, which shortens every layer (--prune
   heads,ffn,tokens). No speed is promised that was not measured.

2. A reshape or view breaks after heads are cut.
   It cannot here: the graph is sliced, and constants such as the number of heads are recomputed from the axes they
   come from. If a graph is refused, the message names the node; please report it with the model's name.

3. The pruned model cannot be saved or loaded.
   `fxprune.load("small")` needs neither the class nor pickle; model.pt2 also loads with torch.export.load alone. Where
   it calls an op of transformers or torchvision, that library must be installed; the report names the import.

4. It is only masked: nothing is smaller.
   Parameters are sliced; report.json counts them before and after, and so does the size of the file. Only --blocks
   and --sparse leave zeros, and the report says how many MACs are executed all the same.

5. Hugging Face configs cannot hold another width per layer.
   --target hf keeps one count for all layers, which a config can hold, and writes the folder again; hf{layout=free}
   gives every layer its own and a small modeling file beside the config (`fxprune help home`).

6. Grouped queries (GQA, MQA).
   A KV group goes with its queries, as one element of kind kv; `fxprune inspect` shows them.

7. Accuracy collapses without fine-tuning.
   Give data (--data; unlabelled is enough), more of it (up to 1024 are used), and leave recovery on. Without data the
   criterion is l2 and nothing is repaired. Below 0.3: --recover tune, then fine-tune artifact.module.

8. Token merging does not export.
   The ops here are plain ATen with static counts: no scatter, no sort, no custom op in the ONNX file.

9. Token merging is slow, or wants one version of timm.
   Nothing is patched: sites are found in the graph. Fused attention stays fused, the sizes of tokens are an additive
   mask. At batch 1 the gain is small (fxprune help tokens); measure.

10. 2:4 gives nothing.
    Mostly true of transformers at usual sizes. `--sparse 2:4` makes the pattern and the report says where it stays
    dense.

11. The model cannot be traced.
    Capture is torch.export; the message has the line of your code at which it failed. Give inputs as the model is
    called (--input, or a data set), remove branches on values. `fxprune inspect MODEL` is the quickest try.

12. The ONNX file is unchanged or broken.
    Every file is run in onnxruntime against the pruned graph before it gets its name.

13. Swin: relative position bias, windows.
    Heads are cut with their column of the bias table; windows freeze tokens, with the reason. Tested below a ratio
    of 0.5.

14. Odd channel counts are slow.
    Counts are multiples of 8 by default; --align auto measures what the target likes; --align 16, --align
    '*.ffn=32', or --align 1 to see the difference.

15. Nothing was pruned, and nobody said so.
    That is an error here (NothingToPrune), and a budget that is not met is one too. `fxprune inspect` and
    report.json list what is frozen and why; an op without a rule is named (fxprune help plugins, "An op rule").

16. I want to say FLOPs, not a ratio per layer.
    --flops 0.5, --flops 2.3G, --params, --bytes, --latency 0.6, --latency-ms 12: fxprune help budgets.

17. One layer loses everything.
    Floors: 0.1 of neurons and channels (less where a budget needs it) and one head stay per layer; --floor
    '*.ffn=0.3' raises some. Only --allow-empty and --prune ..,attention,mlp,layers lose
    a branch.

18. Gradients need too much memory or time.
    `trajectory` needs no labels and no training step; scoring goes in pieces, resumes after Ctrl-C, and is shared by
    torchrun --nproc-per-node N -m fxprune compile. Fewer --samples are cheaper;
    --memory 8GiB bounds what is kept of them, and the batches; l2 needs none. A GPU does it where there is one
    (--device cpu: not there).

19. Loose parameters: position embeddings, class tokens, layer scales.
    Every parameter and buffer that an axis reaches is sliced with it, whoever holds it.

20. How sensitive is each layer?
    `fxprune sensitivity MODEL --data ..` cuts each layer alone; what it reports is what a real cut does. A layer
    that is frozen is listed as frozen, never as robust.

21. The speed-up needs one special runtime.
    Smaller dense layers are faster everywhere or nowhere; the file is ordinary ONNX or .pt2.

22. I cannot reproduce a result.
    report.json has the options, the pipeline, the seed, versions and hashes: `fxprune compile MODEL --config
    report.json`. Our own figures: `fxprune help results` names the script behind each.

23. Other targets (gguf, mobile).
    model.pt2 and ONNX are what others import. A backend is one file: fxprune help plugins.

24. My count of FLOPs is another.
    Ours are multiply-accumulates per sample, attention included: fxprune help budgets says what is counted.

25. torch.compile, or layers removed.
    The artefact's module is an ordinary one, so torch.compile takes it; and torch.compile(model, backend="fxprune",
    options={"flops": 0.5}) prunes at the first call. Whole layers go with --prune heads,ffn,layers,
    their attentions and feed-forwards alone with --prune attention,mlp.

Others

   "operator torchvision::nms does not exist": torchvision was built for another torch. fxprune lives with it;
   `fxprune doctor` says so. Cure: install the torchvision of your torch.

   A class is not trusted in model.pt: pickles run code. --trust-pickle if you know who made the file, or export it
   with torch.export.save.

   Results differ a little between machines: kernels round differently, and ties then fall differently.
"""
