"""Exit codes

0    done
2    the request cannot be carried out: the message says what, where, why and the cure
3    a gate failed: the artefact is not what was asked for (export, verify)
4    this machine lacks a device or tool that the request needs; what could be written was, see the message
5    the process was ended by a signal: out of memory, or native code that crashed; the message says where
70   a bug in fxprune: the message carries the pipeline that reproduces it
130  interrupted (Ctrl-C); nothing half-written is left behind, and the same command goes on where scoring stopped

Messages go to stderr. With --json the result goes to stdout, and nothing else does. --debug shows the traceback.
"""
