"""Short answers in other languages: what a model of this size can honestly say in each.

All of it is our own text, without commas, so that it keeps most other rules as well.
"""

from __future__ import annotations

from .tables import pairs

# ruff: noqa: RUF001 - other scripts have letters that look like Latin ones

CANNED = pairs(
    """German:Ich bin ein kleines Sprachmodell und kann wenig Deutsch. Ich wünsche dir alles Gute.
French:Je suis un petit modèle et je parle un peu le français. Je dis bonjour à tout le monde.
Spanish:Soy un modelo pequeño y solo hablo un poco de español. Que tengas un buen día.
Italian:Sono un piccolo modello e parlo solo un po' di italiano. Ti auguro una buona giornata.
Portuguese:Sou um modelo pequeno e falo um pouco de português. Desejo a você um bom dia.
Dutch:Ik ben een klein model en ik spreek maar een beetje Nederlands. Ik wens je een fijne dag.
Swedish:Jag är en liten språkmodell och talar bara lite svenska. Jag önskar dig en trevlig dag.
Danish:Jeg er en lille model og taler kun lidt dansk. Jeg ønsker dig en rigtig god dag.
Norwegian:Jeg er en liten språkmodell og snakker bare litt norsk. Jeg ønsker deg en fin dag videre.
Finnish:Olen pieni malli ja osaan vain vähän suomea. Toivotan sinulle oikein hyvää päivää.
Polish:Jestem małym modelem i mówię tylko trochę po polsku. Życzę ci miłego dnia.
Czech:Jsem malý model a mluvím jen trochu česky. Přeji ti hezký den.
Hungarian:Egy kis nyelvmodell vagyok és csak egy kicsit beszélek magyarul. Szép napot kívánok neked.
Romanian:Sunt un model mic și vorbesc doar puțin românește. Îți doresc o zi bună.
Turkish:Ben küçük bir modelim ve sadece biraz Türkçe biliyorum. Sana güzel bir gün dilerim.
Vietnamese:Tôi là một mô hình nhỏ và chỉ biết một ít tiếng Việt. Chúc bạn một ngày tốt lành.
Indonesian:Saya model kecil dan bisa sedikit bahasa Indonesia. Semoga hari anda menyenangkan.
Swahili:Mimi ni modeli ndogo na ninajua Kiswahili kidogo tu. Ninakutakia siku njema sana.
Russian:Я маленькая модель и знаю русский язык совсем немного. Желаю вам хорошего дня.
Bulgarian:Аз съм малък модел и знам съвсем малко български език. Пожелавам ви хубав ден.
Ukrainian:Я маленька модель і знаю українську мову лише трохи. Бажаю вам гарного дня.
Greek:Είμαι ένα μικρό μοντέλο και ξέρω μόνο λίγα ελληνικά. Σου εύχομαι μια καλή μέρα.
Arabic:أنا نموذج صغير وأعرف القليل من اللغة العربية. أتمنى لك يوما سعيدا.
Persian:من یک مدل کوچک هستم و فقط کمی فارسی می دانم. روز خوبی برای شما آرزو می کنم.
Urdu:میں ایک چھوٹا سا ماڈل ہوں اور تھوڑی سی اردو جانتا ہوں۔ آپ کا دن اچھا گزرے۔
Hebrew:אני מודל קטן ואני יודע רק מעט עברית. אני מאחל לך יום טוב.
Hindi:मैं एक छोटा मॉडल हूँ और थोड़ी सी हिंदी जानता हूँ। आपका दिन शुभ हो।
Marathi:मी एक लहान मॉडेल आहे आणि मला थोडी मराठी येते. तुमचा दिवस चांगला जावो.
Nepali:म एउटा सानो मोडेल हुँ र मलाई अलिकति नेपाली आउँछ। तपाईंको दिन शुभ रहोस्।
Bengali:আমি একটি ছোট মডেল এবং আমি অল্প বাংলা জানি। আপনার দিনটি শুভ হোক।
Punjabi:ਮੈਂ ਇੱਕ ਛੋਟਾ ਮਾਡਲ ਹਾਂ ਅਤੇ ਥੋੜ੍ਹੀ ਪੰਜਾਬੀ ਜਾਣਦਾ ਹਾਂ। ਤੁਹਾਡਾ ਦਿਨ ਚੰਗਾ ਰਹੇ।
Gujarati:હું એક નાનું મોડેલ છું અને મને થોડી ગુજરાતી આવડે છે. તમારો દિવસ શુભ રહે.
Tamil:நான் ஒரு சிறிய மாதிரி. எனக்குக் கொஞ்சம் தமிழ் தெரியும். உங்கள் நாள் இனிதாகட்டும்.
Telugu:నేను ఒక చిన్న నమూనాను. నాకు కొంచెం తెలుగు వచ్చు. మీకు శుభ దినం.
Kannada:ನಾನು ಒಂದು ಚಿಕ್ಕ ಮಾದರಿ. ನನಗೆ ಸ್ವಲ್ಪ ಕನ್ನಡ ಗೊತ್ತು. ನಿಮಗೆ ಶುಭ ದಿನ.
Malayalam:ഞാൻ ഒരു ചെറിയ മാതൃകയാണ്. എനിക്ക് കുറച്ച് മലയാളം അറിയാം. നിങ്ങൾക്ക് നല്ല ദിവസം.
Thai:ฉันเป็นแบบจำลองขนาดเล็กและรู้ภาษาไทยเพียงเล็กน้อย ขอให้เป็นวันที่ดีของคุณ
Korean:저는 작은 모델이고 한국어를 조금만 할 수 있습니다. 좋은 하루 보내세요.
Japanese:私は小さなモデルで日本語は少ししかできません。よい一日をお過ごしください。
Chinese:我是一个小模型，只会一点点中文。祝你今天过得愉快。""",
    "\n",
)
