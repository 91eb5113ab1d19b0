from .array import MXFP4Array as MXFP4Array
from .checkpoint import Checkpoint as Checkpoint
from .codec import decode as decode
from .codec import encode as encode
from .errors import BackendUnavailableError as BackendUnavailableError
from .errors import CheckpointError as CheckpointError
from .errors import CheckpointWarning as CheckpointWarning
from .errors import DeviceMemoryError as DeviceMemoryError
from .errors import LayoutError as LayoutError
from .errors import MXFP4Error as MXFP4Error
from .errors import RemoteError as RemoteError
from .errors import TensorNotFoundError as TensorNotFoundError
from .files import load_file as load_file
from .files import save_file as save_file
from .layouts.packed import TensorInfo as TensorInfo
from .products import linear as linear
from .rewrite.bar import progress_bar as progress_bar
from .rewrite.convert import Conversion as Conversion
from .rewrite.convert import convert as convert
from .rewrite.encode import Encoding as Encoding
from .rewrite.encode import encode_checkpoint as encode_checkpoint
from .rewrite.findings import Verification as Verification
from .rewrite.verify import verify as verify
from .rewrite.workers import Progress as Progress
from .scaled import ScaledArray as ScaledArray
from .shard import CheckpointShard as CheckpointShard

__version__: str
