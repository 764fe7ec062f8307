"""Comparison

What each does about pruning a pretrained network. Ours is tested in this repository; what is said of others is from
their documentation, code and issue threads as of 2026 (numbers are issues of the tool). They change: check theirs.
NNCF's column is about its 2.x releases: 3.0 (2026) took structured pruning out and keeps magnitude masks.

                            fxprune              Torch-Pruning        NNCF 2.x             ModelOpt
--------------------------  -------------------  -------------------  -------------------  -------------------------
sees the network as         torch.export graph   autograd trace and   module graph with    module types it knows
                                                 module types         hooks
heads                       read off the graph   num_heads hints      movement sparsity    known attention classes
other sizes in every layer  yes                  yes (channels)       yes (filters)        FastNAS, Puzzletron; one
                                                                                           size in Minitron
asks for                    FLOPs, parameters,   share of channels    share of filters or  FLOPs or parameters
                            bytes or measured                         FLOPs                (FastNAS), dimensions or
                            time                                                           parameters (Minitron)
data                        some, unlabelled     none, or labels for  training             evaluation in the search
                                                 Taylor
without training after      recovery in closed   accuracy falls       trains while it      fine-tune or distil
                            form, measured       (#55, #347)          prunes
the result is checked       sliced = masked,     no (most of its      -                    in its own tests
                            file = graph, every  tests have no
                            run                  assert)
saved as                    graph and weights,   pickled module       exported model       replayed changes on the
                            no class, no pickle                                            original class
tokens                      merge or drop        no                   no                   no
quantisation                no                   no                   yes, its main work   yes, its main work
2:4, tiles                  zeros and a gate     no                   unstructured         2:4
large language models       structure yes        examples             -                    its main work: depth, MoE,
                            (GQA), not tuned                                               Mamba, Megatron
targets written             ONNX, TensorRT,      no (export is        OpenVINO, ONNX       TensorRT, TensorRT-LLM,
                            inductor, Triton     left to you)                              ONNX
tried on GPUs               no: engines and      yes                  yes                  yes, its home
                            kernels are built,
                            not run
training recipes            none                 many examples        schedulers,          distillation at scale
                                                                      distillation
age, users                  young, few           years, many          years, many          years, many

Take another tool when you will train anyway and want many ready recipes (Torch-Pruning), when the target is OpenVINO
and the answer is int8 (NNCF), when the model is a large language model on NVIDIA hardware (ModelOpt). Quantise after
pruning: what fxprune writes is an ordinary graph.

Measured side by side, same model, data and count of MACs: `fxprune help results` has Torch-Pruning's rows (its best of
five settings, chosen on the figure itself; at 0.9 on MiniLM it is ahead of the default); in a checkout, python
tools/peers/torch_pruning.py reruns it. NNCF and ModelOpt were not run.
"""
