"""An ONNX file as the model

  fxprune compile model.onnx --target onnx --flops 0.6 --data samples.npz --out small
  fxprune inspect model.onnx

The file is read op by op into a PyTorch module; everything else is as with any model: inspect, compile, plan, sweep,
bench and verify take it, and so does fxprune.compile("model.onnx", ...). Nothing in it is run but its arithmetic.

Proof      Before anything is done the module is held against onnxruntime on the file, at two values of every size that
           the file leaves open; a difference above the tolerance is an error that names the node in which it starts. It
           is the first link of the chain of proof in the report.
Sizes      What the file fixes stays fixed, and what it leaves open (batch, seq, ?) stays open, at once in all inputs
           that use the same word. A size that cannot stay open is told, with the reason.
Names      Inputs and outputs keep their names, in the ONNX file that is written too; --input, data and Python call an
           input by the same with underscores for what is no letter or digit (image:0 is image_0).
           Weights are named as PyTorch named them, else by the path of the node that reads them: /layer.0/query/MatMul
           gives layer.0.query.weight, and groups and reports read so.
Opsets     11 to 23; onnx.version_converter.convert_version makes another of an older file.
Ops        About 120, com.microsoft::Gelu and the like included. Products with a constant matrix, and the sum behind
           them, are read as linear layers; graphs that compute shapes are done while the file is read.
Weights    In the file, or beside it in files of its folder; never outside of that folder, and not through links. fp32,
           fp16, fp64; bf16 is read, but onnxruntime has no kernels to compare it with.
Tokenizer  Of the folder that the file lies in, where one is there: then --data takes texts.

What is refused, each with the node, the op and what helps:

  If, Loop, Scan            control flow: which graph runs depends on values
  LSTM, GRU, RNN            recurrences
  QLinearConv, ...          quantised graphs: give the model as it was before
  NonZero, Unique           results whose size depends on values
  random numbers, texts, sequences, sparse initialisers, ops of the file's own

NonMaxSuppression ends the graph: the result returns the boxes and scores that it reads, and a note says so. Put it
behind the result again with onnx.compose.merge_models.

A file that exporters wrote from random or untrained weights may hold equal biases once: each layer gets its own again.
Equal matrices stay one, as tied embeddings do.
"""
