"""Targets

--target NAME says what file is written beside model.pt2, which always is. Whatever is written is run against the
pruned graph on seeded inputs at several batch sizes before it gets its name; a difference above the tolerance is an
error, and no file is left behind.

{targets}

eager loads without the model's class. onnx is opset 18 to 20 without any custom op. triton runs block-sparse layers
(--blocks) where a measured table says that they win, and keeps them dense elsewhere.

`fxprune doctor` lists the targets of this installation, those of plugins included, with what each one needs and
whether it is there:

  fxprune doctor
  fxprune doctor --target onnx --json

`fxprune lower` takes an artefact to another target, or finishes it where the GPU is. What is known of the targets it
had before (parity, latency, versions) stays in the report. The dense model is in no artefact: name it to have the
result timed beside it. Calibration data goes to targets that look at it: fp16 is checked on it, value by value,
against 65504.

  fxprune lower small --target 'trt{dtype=fp16}' --data images.npz --against model.pt --batch 8

What a target likes (multiples of channels) is its `granularity`; --align overrides it. A target of your own is one
file: see fxprune help plugins.

Half precision: the graph keeps the dtype of the model. Convert before compile, and the tolerance is that of the
dtype.
"""
