import java.io.ByteArrayOutputStream;
import java.io.DataInputStream;
import java.io.DataOutputStream;
import java.io.OutputStream;
import java.io.PrintStream;
import java.io.StringWriter;
import java.net.URI;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import javax.tools.FileObject;
import javax.tools.ForwardingJavaFileManager;
import javax.tools.JavaCompiler;
import javax.tools.JavaFileManager;
import javax.tools.JavaFileObject;
import javax.tools.SimpleJavaFileObject;
import javax.tools.StandardJavaFileManager;
import javax.tools.ToolProvider;

/**
 * Compiles source after source in one warm JVM: tens of milliseconds each, where javac takes a second.
 *
 * Request on standard input: int count, then count times (text name, text source).
 * Answer on standard output: text messages, int count (-1: it does not compile), then count times
 * (text class file, bytes). Texts and bytes are an int length and UTF-8. No code of a program runs: annotation
 * processing is off.
 */
public final class FlexCompiler {
    private static final JavaCompiler COMPILER = ToolProvider.getSystemJavaCompiler();

    public static void main(String[] args) throws Exception {
        DataInputStream in = new DataInputStream(System.in);
        DataOutputStream out = new DataOutputStream(System.out);
        System.setOut(new PrintStream(OutputStream.nullOutputStream()));
        List<String> options = List.of("-proc:none", "-nowarn", "-Xlint:none", "-cp", args[0]);
        while (true) {
            List<Source> sources = new ArrayList<>();
            for (int count = in.readInt(); count > 0; count--) {
                sources.add(new Source(read(in), read(in)));
            }
            answer(out, options, sources);
        }
    }

    private static void answer(DataOutputStream out, List<String> options, List<Source> sources) throws Exception {
        StringWriter messages = new StringWriter();
        boolean done;
        Map<String, Output> classes;
        try (StandardJavaFileManager files = COMPILER.getStandardFileManager(null, null, StandardCharsets.UTF_8);
                Memory memory = new Memory(files)) {
            done = COMPILER.getTask(messages, memory, null, options, null, sources).call();
            classes = memory.classes;
        } catch (RuntimeException | StackOverflowError error) { // javac's own faults
            messages.append(error.toString());
            done = false;
            classes = Map.of();
        }
        write(out, messages.toString().getBytes(StandardCharsets.UTF_8));
        out.writeInt(done ? classes.size() : -1);
        if (done) {
            for (Map.Entry<String, Output> entry : classes.entrySet()) {
                write(out, entry.getKey().getBytes(StandardCharsets.UTF_8));
                write(out, entry.getValue().bytes.toByteArray());
            }
        }
        out.flush();
    }

    private static String read(DataInputStream in) throws Exception {
        return new String(in.readNBytes(in.readInt()), StandardCharsets.UTF_8);
    }

    private static void write(DataOutputStream out, byte[] data) throws Exception {
        out.writeInt(data.length);
        out.write(data);
    }

    private static final class Source extends SimpleJavaFileObject {
        private final String text;

        Source(String name, String text) {
            super(URI.create("string:///" + name), Kind.SOURCE);
            this.text = text;
        }

        @Override
        public CharSequence getCharContent(boolean ignoreEncodingErrors) {
            return text;
        }
    }

    private static final class Output extends SimpleJavaFileObject {
        private final ByteArrayOutputStream bytes = new ByteArrayOutputStream();

        Output(String name) {
            super(URI.create("memory:///" + name), Kind.CLASS);
        }

        @Override
        public OutputStream openOutputStream() {
            return bytes;
        }
    }

    private static final class Memory extends ForwardingJavaFileManager<JavaFileManager> {
        private final Map<String, Output> classes = new LinkedHashMap<>();

        Memory(JavaFileManager files) {
            super(files);
        }

        @Override
        public JavaFileObject getJavaFileForOutput(
                Location location, String name, JavaFileObject.Kind kind, FileObject sibling) {
            String file = name.replace('.', '/') + ".class";
            return classes.computeIfAbsent(file, Output::new);
        }
    }
}
