"""How layers are stacked into a language model, generated from and looked into."""

from recollect.configuration import exported_names
from recollect.layers.mixer import MixerOutput as ModelOutput
from recollect.models.accounting import flops_per_token, parameters_by_part, state_elements_at, trainable_parameters
from recollect.models.activations import activations
from recollect.models.autoencoder import Autoencoder, AutoencoderModule
from recollect.models.canon import Canon
from recollect.models.classifier import Classifier, ClassifierModule
from recollect.models.conversion import converted
from recollect.models.encoder import Encoder, EncoderModule
from recollect.models.functional import FunctionalModel, count, flatten, nest, state_bytes_at
from recollect.models.generation import Generation, GenerationPrograms, Piece, generate
from recollect.models.infini_retri import InfiniRetri, KeptTokens, retrieve_sentences
from recollect.models.language_model import LanguageModel, LanguageModelModule, ModelState, state_bytes
from recollect.models.lora import LoRA
from recollect.models.projector import Projector, ProjectorModule
from recollect.models.sampling import Sampling
from recollect.models.stack import Block, Stack, Stage, repeat
from recollect.models.text_generation import Continuation, TextPart, TextStream, continue_texts

__all__ = [*exported_names(globals()), "ModelOutput"]
