# `make` lists the targets.  The first one that needs Python makes .venv from requirements.txt.
PYTHON ?= python3
PRESET ?= smoke
SCRIPT ?= drift_toy
DATA   ?= data
SOURCES ?= sources.json
LIMIT  ?= 0
VOCAB  ?= 32000
LENGTH ?= 2048
VENV   := .venv/bin/python
ALL    := $(basename $(wildcard drift_*.py dit_t2i.py hope_lm.py beta_vae_arc.py streetvision.py))

.PHONY: help demo test test-gpu parity smoke drill repro bench table report pack clean hope-data-sample hope-data-full

help:            ## this list
	@grep -hE '^[a-z-]+[a-z -]*:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install -q -r requirements.txt
	touch $@

demo: .venv/ready    ## fresh machine to first pictures: drifting in 2-D
	$(VENV) drift_toy.py --preset demo

test: .venv/ready    ## all tests, two processes that share them; CPU, no network
	@queue=$$(mktemp -d); export OMP_NUM_THREADS=1 ONEFILE_QUEUE=$$queue; \
	$(VENV) -m pytest -q --ignore=tests/parity >$$queue/second.log 2>&1 & second=$$!; \
	$(VENV) -m pytest -q --ignore=tests/parity; first=$$?; \
	wait $$second; other=$$?; cat $$queue/second.log; rm -r $$queue; [ $$first -eq 0 ] && [ $$other -eq 0 ]

test-gpu: .venv/ready    ## the tests that need a CUDA device
	$(VENV) -m pytest -q tests -k gpu

.venv-parity/ready: requirements.txt tests/parity/requirements.txt
	$(PYTHON) -m venv .venv-parity
	.venv-parity/bin/python -m pip install -q -r requirements.txt
	.venv-parity/bin/python -m pip install -q --no-deps -r tests/parity/requirements-no-deps.txt
	.venv-parity/bin/python -m pip install -q -r tests/parity/requirements.txt
	touch $@

parity: .venv-parity/ready    ## against the public implementations, in an environment of its own
	.venv-parity/bin/python -m pytest -q tests/parity

smoke: .venv/ready    ## every script end to end on the data it makes itself
	@for s in $(ALL); do echo "== $$s"; $(VENV) $$s.py --preset smoke --out runs/$$s/smoke || exit 1; done

drill: .venv/ready    ## kills, damage, hostile files, a full disk, two at once; JSON into docs/drills
	OMP_NUM_THREADS=1 $(VENV) -m eval.drills

repro: .venv/ready    ## make repro SCRIPT=drift_latent PRESET=table8_l2
	$(VENV) $(SCRIPT).py --preset $(PRESET)

bench: .venv-parity/ready    ## ratios against installed peers, paired; writes bench.json
	.venv-parity/bin/python -m eval.bench --json bench.json

table: .venv/ready    ## the README's results table from runs/*/*/log.jsonl
	$(VENV) -m eval.table

report: .venv/ready    ## report.html over all runs
	$(VENV) -m eval.report $(wildcard runs/*/*) --out report.html

hope-data-sample: SOURCES =
hope-data-sample: LIMIT = 400
hope-data-sample: VOCAB = 512
hope-data-sample: LENGTH = 256
hope-data-sample hope-data-full: .venv/ready    ## hope_lm's corpus, tokenizer and shards; full: SOURCES=sources.json
	$(VENV) hope_lm.py corpus --data "$(SOURCES)" --limit $(LIMIT) --out $(DATA)/$@
	$(VENV) hope_lm.py tokenizer --data $(DATA)/$@ --vocab $(VOCAB) --out $(DATA)/$@
	$(VENV) hope_lm.py shard --data $(DATA)/$@ --tokenizer $(DATA)/$@/tokenizer.json --length $(LENGTH) --out $(DATA)/$@/shards
	$(VENV) hope_lm.py validate --data $(DATA)/$@/shards

pack: .venv/ready    ## make pack SCRIPT=drift_toy: script and common as a tar
	mkdir -p dist && tar -czf dist/$(SCRIPT).tar.gz --exclude=__pycache__ $(SCRIPT).py common requirements.txt LICENSE

clean:           ## forget the environments; runs stay
	rm -rf .venv .venv-parity dist
