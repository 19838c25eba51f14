"""Experiments: one question in each file; the file's name is the experiment's.

A leaf is a module, importable without torch, with

- a first docstring line that says what it asks or shows;
- `Settings`: what can be set on it (`--set KEY=VALUE`);
- `carry_out(settings, folder, show)`: carries it out into a folder that is there and empty, gives `show` what a person
  should read, a text at a time, and returns the files that it wrote, the most telling one first.
"""
