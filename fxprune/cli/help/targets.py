"""Targets

--target NAME says what file is written beside model.pt2, which always is. Whatever is written is run against the
pruned graph on seeded inputs at several batch sizes before it gets its name; a difference above the tolerance is an
error, and no file is left behind.

{targets}

eager loads without the model's class. onnx is opset 18 to 20 without any custom op; --target
'onnx{opset=20,external=true}' says which, and puts the weights in a file beside it. triton runs block-sparse layers
(--blocks) where a measured table says that they win, and keeps them dense elsewhere.

`fxprune doctor` lists the targets of this installation, those of plugins included, with what each one needs and
whether it is there:

  fxprune doctor
  fxprune doctor --target onnx --json

TensorRT (trt) makes one engine of the whole graph, or names the node, its pass and its source line: nothing falls back
to PyTorch unseen. dtype is fp32 (no TF32), tf32, fp16 or bf16; casts are written into the graph, and with fp16 every
value is checked against 65504 on your data first. Where the GPU or a package is missing, model.pt2 and a
TensorRT-ready model.onnx are written, the message says what is missing and how to finish (`fxprune lower`, or a
trtexec command), and the exit code is 4:

  fxprune compile vit.pt --target 'trt{dtype=fp16}' --flops 0.5 --data images/ --out engine
  fxprune lower engine --target 'trt{dtype=fp16}'

Several targets at once, with gates (accuracy, parity, latency, size) and a manifest that anyone can verify later:

  fxprune export ./my-bert --plan plan.json --target onnx,trt --verify test.csv --max-drop 0.01 \\
    --max-latency-ms 15 --out release
  fxprune verify release --skip-latency

Nothing is searched then; the same request twice changes nothing, and exit code 3 says that a gate failed.

`fxprune lower` takes an artefact to another target, or finishes it where the GPU is. What is known of the targets it
had before (parity, latency, versions) stays in the report. The dense model is in no artefact: name it to have the
result timed beside it. Calibration data goes to targets that look at it: fp16 is checked on it, value by value,
against 65504.

  fxprune lower engine --target 'trt{dtype=fp16}' --data images/ --against vit.pt --batch 8

What a target likes (multiples of channels) is its `granularity`; --align overrides it. A target of your own is one
file: see fxprune help plugins.

Half precision: the graph keeps the dtype of the model. Convert before compile, and the tolerance is that of the
dtype.
"""
