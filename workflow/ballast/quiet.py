"""Imported before the heavy libraries: their bars and advice stay out of logs and terminals."""

import logging
import os
import warnings

os.environ.setdefault("TQDM_DISABLE", "1")  # Ballast's own bars ask for themselves explicitly.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
logging.getLogger("lm_eval").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*torchvision.*")
