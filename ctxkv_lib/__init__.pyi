"""The public API: each name and its module. `__init__.py` reads this file and imports a name on first use."""

from . import baselines as baselines
from .data.conversations import load_conversations as load_conversations
from .data.tokens import load_tokenizer as load_tokenizer
from .data.tokens import train_stream as train_stream
from .data.tokens import validation_stream as validation_stream
from .errors import UserError as UserError
from .experiments import compare as compare
from .experiments import prepare as prepare
from .experiments import run as run
from .measure.other_text import evaluate_texts as evaluate_texts
from .method.config import ModelConfig as ModelConfig
from .method.memory import snapshot as snapshot
from .method.model import ContextBlock as ContextBlock
from .method.model import ContextKV as ContextKV
from .parallel import run_all as run_all
from .report.card import card as card
from .report.difference import difference as difference
from .report.document import write_report as write_report
from .report.export import export as export
from .report.info import describe as describe
from .report.tables import comparison_table as comparison_table
from .runs.folders import comparison_folder as comparison_folder
from .runs.folders import run_folder_of as run_folder_of
from .runs.generation import generate_text as generate_text
from .runs.listing import results as results
from .runs.memory_span import memory_span as memory_span
from .runs.opened import open_run as open_run
from .runs.presets import build_config as build_config
from .runs.presets import compared_samples as compared_samples
from .runs.published import PUBLISHED as PUBLISHED
from .runs.summary import Run as Run
from .runs.summary import load_run as load_run
from .views.curves import explore_runs as explore_runs
from .views.explore import explore_window as explore_window
from .views.figures import STYLE as STYLE
from .views.figures import memory_by_stage as memory_by_stage
from .views.figures import phase1_curves as phase1_curves
from .views.figures import ppl_curves as ppl_curves
from .views.live import LiveCurves as LiveCurves
from .views.notebook import notebook_config as notebook_config
from .views.notebook import session as session

__version__: str
